"""Huffman coding of codebook indices."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["code_lengths", "decode", "encode", "entropy"]

LONGEST = 16
"""Largest length of a code in bits, so that one lookup table can decode it."""

Symbols = NDArray[np.int64]


def entropy(counts: Sequence[int]) -> float:
    """Compute the entropy in bits per symbol: the lower bound of a memoryless code.

    Example:
        >>> entropy([1, 1, 2])
        1.5
    """
    total = sum(counts)
    return -sum(count / total * math.log2(count / total) for count in counts if count)


def code_lengths(counts: Sequence[int]) -> list[int]:
    """Compute the length of each symbol's Huffman code, at most 16; 0 for symbols that do not occur.

    Huffman, 1952, "A Method for the Construction of Minimum-Redundancy Codes".

    Example:
        >>> code_lengths([5, 1, 1, 0])
        [1, 2, 2, 0]
    """
    counts = list(counts)
    while True:
        lengths = _lengths(counts)
        if max(lengths, default=0) <= LONGEST:
            return lengths
        counts = [(count + 1) // 2 for count in counts]  # rarely, and then at a loss far below a percent


def encode(symbols: Symbols, lengths: Sequence[int]) -> bytes:
    """Concatenate the symbols' canonical codes, the first bit highest, padded to whole bytes."""
    codes = np.array(_canonical(lengths), dtype=np.int64)
    sizes = np.array(lengths, dtype=np.int64)[symbols]
    ends = np.cumsum(sizes)
    bits = np.zeros(int(ends[-1]) if len(ends) else 0, dtype=np.uint8)
    starts, words = ends - sizes, codes[symbols]
    for place in range(max(lengths, default=0)):
        here = sizes > place
        bits[starts[here] + place] = (words[here] >> (sizes[here] - 1 - place)) & 1
    return np.packbits(bits).tobytes()


def decode(data: bytes, lengths: Sequence[int], count: int) -> Symbols:
    """Decode ``count`` symbols from the result of `encode`.

    Raises:
        ValueError: the bits end before that.
    """
    width = max(lengths, default=0)
    if not count or not width:
        return np.zeros(count, dtype=np.int64)
    table = np.zeros((1 << width, 2), dtype=np.int64)
    for symbol, (length, code) in enumerate(zip(lengths, _canonical(lengths), strict=True)):
        if length:
            table[code << (width - length) : (code + 1) << (width - length)] = symbol, length
    bits = np.concatenate([np.unpackbits(np.frombuffer(data, np.uint8)), np.zeros(width, np.uint8)]).astype(np.int64)
    windows = sum(bits[place : len(bits) - width + place + 1] << (width - 1 - place) for place in range(width))
    found, steps = table[windows, 0].tolist(), table[windows, 1].tolist()
    symbols, position, last = [], 0, len(data) * 8
    for _ in range(count):
        symbols.append(found[position])
        position += steps[position]
        if position > last:
            raise ValueError("Expected a code for every weight, found the end of the data: the file is damaged.")
    return np.array(symbols, dtype=np.int64)


def _lengths(counts: Sequence[int]) -> list[int]:
    heap: list[tuple[int, int, list[int]]] = [(count, place, [place]) for place, count in enumerate(counts) if count]
    lengths = [0] * len(counts)
    if len(heap) == 1:
        lengths[heap[0][1]] = 1
    heapq.heapify(heap)
    while len(heap) > 1:
        first, second = heapq.heappop(heap), heapq.heappop(heap)
        for symbol in first[2] + second[2]:
            lengths[symbol] += 1
        heapq.heappush(heap, (first[0] + second[0], min(first[1], second[1]), first[2] + second[2]))
    return lengths


def _canonical(lengths: Sequence[int]) -> list[int]:
    """Assign the codes of these lengths, ascending by length and then by symbol."""
    codes, code, before = [0] * len(lengths), 0, 0
    for length, symbol in sorted((length, symbol) for symbol, length in enumerate(lengths) if length):
        code <<= length - before
        codes[symbol], before = code, length
        code += 1
    return codes
