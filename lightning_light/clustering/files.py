"""A small file for a clustered network: codebooks and Huffman codes, without pickle.

The layout, all numbers little-endian:

| bytes | what |
|---|---|
| 0-3 | ``LLWC`` |
| 4-7 | version, 1 |
| 8-15 | length of the header |
| then | the header: JSON, a list with one entry a tensor of the state dict: ``name``, ``shape``, ``dtype``, ``kind``, ``size`` (bytes of its data), and for ``kind: "codebook"`` ``rows``, ``lengths`` (of the code of each symbol) |
| then | the tensors' data, one after the other in the header's order |

``kind: "raw"``: the tensor's elements. ``kind: "codebook"``: the centroids, ``rows * len(lengths)`` elements, then one
bit stream of canonical Huffman codes, one code a weight.
"""  # noqa: E501  (a table)

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_light.clustering.coding import code_lengths, decode, encode, entropy

__all__ = ["ClusteredTensor", "clustered_sizes", "load_clustered", "save_clustered"]

_MAGIC, _VERSION, _MOST = b"LLWC", 1, 256


@dataclass(frozen=True)
class ClusteredTensor:
    """What one tensor takes in the file.

    Attributes:
        name: in the state dict.
        weights: elements.
        values: different values, in the row that has the most; 0 where the tensor is written as it is.
        entropy: bits a weight that its places carry, without the codebook.
        bits: bits a weight in the file, the codebook included.
    """

    name: str
    weights: int
    values: int
    entropy: float
    bits: float


def save_clustered(model: nn.Module | Mapping[str, Tensor], path: str | Path) -> list[ClusteredTensor]:
    """Write the state dict of ``model``; tensors of few different values as codebook and Huffman codes.

    A tensor counts as clustered if it has at most 256 different values, in all or in each of its rows, and is smaller
    so. All others are written as they are; reading gives every tensor back to the last bit.

    Args:
        model: a module, or a state dict.
        path: where to.

    Returns:
        What each tensor takes.

    Example:
        >>> import tempfile
        >>> layer = nn.Linear(64, 64, bias=False)
        >>> layer.weight.data = layer.weight.data.sign() * 0.1
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     (row,) = save_clustered(layer, f"{folder}/layer.llwc")
        ...     same = torch.equal(load_clustered(f"{folder}/layer.llwc")["weight"], layer.weight)
        >>> same, row.values, round(row.bits)
        (True, 2, 1)
    """
    header, data, rows = [], [], []
    for name, tensor in _state(model).items():
        entry, written, row = _packed(name, tensor.detach().cpu().contiguous())
        header.append(entry)
        data.append(written)
        rows.append(row)
    text = json.dumps(header).encode()
    parts = [_MAGIC, _VERSION.to_bytes(4, "little"), len(text).to_bytes(8, "little"), text, *data]
    Path(path).write_bytes(b"".join(parts))
    return rows


def load_clustered(path: str | Path) -> dict[str, Tensor]:
    """The state dict that `save_clustered` wrote, for ``model.load_state_dict``.

    Raises:
        ValueError: the file is of another kind, newer, or cut off.
    """
    blob = Path(path).read_bytes()
    version = int.from_bytes(blob[4:8], "little")
    if blob[:4] != _MAGIC or version != _VERSION:
        raise ValueError(
            f"`load_clustered({str(path)!r})`: expected a file that `save_clustered` wrote (it begins with LLWC, "
            f"version {_VERSION}), found {blob[:4]!r}, version {version}."
        )
    start = 16 + int.from_bytes(blob[8:16], "little")
    header: list[dict[str, Any]] = json.loads(blob[16:start])
    expected = start + sum(entry["size"] for entry in header)
    if len(blob) != expected:
        raise ValueError(f"`load_clustered({str(path)!r})`: expected {expected} bytes, found {len(blob)}: cut off.")
    state = {}
    for entry in header:
        state[entry["name"]] = _unpacked(entry, blob[start : start + entry["size"]])
        start += entry["size"]
    return state


def clustered_sizes(model: nn.Module | Mapping[str, Tensor]) -> list[ClusteredTensor]:
    """What each tensor of ``model`` would take, without writing it."""
    return [_packed(name, tensor.detach().cpu().contiguous())[2] for name, tensor in _state(model).items()]


def _state(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = model.state_dict() if isinstance(model, nn.Module) else model
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _packed(name: str, tensor: Tensor) -> tuple[dict[str, Any], bytes, ClusteredTensor]:
    entry = {"name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
    plain = _bytes(tensor)
    for rows in dict.fromkeys((1, tensor.shape[0] if tensor.dim() > 1 else 1)):
        found = _codebook(tensor, rows)
        if found is not None and len(found[1]) < len(plain):
            lengths, written, bits = found
            row = ClusteredTensor(name, tensor.numel(), len(lengths), bits, 8 * len(written) / tensor.numel())
            details = {"kind": "codebook", "rows": rows, "lengths": lengths, "size": len(written)}
            return {**entry, **details}, written, row
    whole = 8 * len(plain) / max(tensor.numel(), 1)
    return {**entry, "kind": "raw", "size": len(plain)}, plain, ClusteredTensor(name, tensor.numel(), 0, whole, whole)


def _codebook(tensor: Tensor, rows: int) -> tuple[list[int], bytes, float] | None:
    """Lengths of the codes, the data, and the entropy; None if there are too many values to be worth it."""
    if not tensor.is_floating_point() or tensor.numel() < 2 * rows:
        return None
    books, places = [], []
    for row in tensor.reshape(rows, -1):
        values, inverse = _unique_bits(row)
        if len(values) > _MOST:
            return None
        books.append(values)
        places.append(inverse)
    width = max(map(len, books))
    centroids = torch.stack([torch.cat([book, book.new_zeros(width - len(book))]) for book in books])
    symbols = torch.cat(places).numpy()
    counts = np.bincount(symbols, minlength=width).tolist()
    lengths = code_lengths(counts)
    return lengths, _bytes(centroids) + encode(symbols, lengths), entropy(counts)


def _unique_bits(row: Tensor) -> tuple[Tensor, Tensor]:
    """Different values, told apart by their bits (a negative zero stays one), ordered by how often they occur."""
    kinds: dict[int, torch.dtype] = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    pattern = row.view(kinds[row.element_size()])
    bits, inverse, counts = torch.unique(pattern, return_inverse=True, return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order))
    return bits[order].view(row.dtype), ranks[inverse]


def _unpacked(entry: Mapping[str, Any], data: bytes) -> Tensor:
    dtype: torch.dtype = getattr(torch, entry["dtype"])
    if entry["kind"] == "raw":
        return _tensor(data, dtype).reshape(entry["shape"])
    rows, lengths = entry["rows"], entry["lengths"]
    cut = rows * len(lengths) * dtype.itemsize
    centroids = _tensor(data[:cut], dtype).reshape(rows, len(lengths))
    count = int(np.prod(entry["shape"]))
    symbols = torch.from_numpy(decode(data[cut:], lengths, count)).reshape(rows, -1)
    return centroids.gather(1, symbols).reshape(entry["shape"])


def _bytes(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _tensor(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
