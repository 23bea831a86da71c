"""Store a clustered network in a small safetensors file: codebooks and Huffman codes.

A tensor ``name`` with few different values is stored as three tensors: ``name::centroids``, ``(rows, values)``;
``name::code_lengths``, the length of each value's canonical Huffman code; ``name::codes``, one bit stream with a code
per weight. All other tensors are stored as they are. The metadata has ``format``, ``version``, and under ``tensors``
the names in order with the shape of those that are coded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_light.atomic import atomic_write
from lightning_light.clustering.coding import code_lengths, decode, encode, entropy
from lightning_light.validation import validated

__all__ = ["ClusteredTensor", "clustered_sizes", "load_clustered", "save_clustered"]

_FORMAT, _VERSION = "lightning_light.clustering", "1"
_MOST_VALUES = 256
_PARTS = ("centroids", "code_lengths", "codes")
_SAME_WIDTH: dict[int, torch.dtype] = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class ClusteredTensor:
    """Size of one tensor in the file.

    Attributes:
        name: in the state dict.
        weights: number of elements.
        values: different values, in the row that has the most; 0 where the tensor is stored as it is.
        entropy: bits per weight of the assignments, without the codebook.
        bits: bits per weight in the file, codebook included.
    """

    name: str
    weights: int
    values: int
    entropy: float
    bits: float


@dataclass(frozen=True, eq=False)
class _Coded:
    """A tensor as codebook and Huffman codes."""

    centroids: Tensor
    code_lengths: Tensor
    codes: Tensor
    entropy: float

    @property
    def bytes(self) -> int:
        return sum(getattr(self, part).nbytes for part in _PARTS)


@validated
def save_clustered(model: nn.Module | Mapping[str, Tensor], path: str | Path) -> list[ClusteredTensor]:
    """Write the state dict of ``model``; tensors of few different values as codebook and Huffman codes.

    A tensor is coded if it has at most 256 different values, in total or in each of its rows, and is smaller that way.
    Reading restores every tensor exactly.

    Args:
        model: a module, or a state dict.
        path: of the file, ``"model.safetensors"``.

    Returns:
        The size of each tensor.

    Example:
        >>> import tempfile
        >>> layer = nn.Linear(64, 64, bias=False)
        >>> layer.weight.data = layer.weight.data.sign() * 0.1
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     (row,) = save_clustered(layer, f"{folder}/layer.safetensors")
        ...     same = torch.equal(load_clustered(f"{folder}/layer.safetensors")["weight"], layer.weight)
        >>> same, row.values, round(row.bits)
        (True, 2, 1)
    """
    from safetensors.torch import save_file  # loaded when a file is written

    stored: dict[str, Tensor] = {}
    shapes: dict[str, list[int] | None] = {}
    rows = []
    for name, tensor in _state(model).items():
        coded = _coded(tensor)
        rows.append(_size(name, tensor, coded))
        shapes[name] = None if coded is None else list(tensor.shape)
        if coded is None:
            stored[name] = tensor.clone()  # tied tensors share memory, which the format refuses
        else:
            stored |= {f"{name}::{part}": getattr(coded, part) for part in _PARTS}
    metadata = {"format": _FORMAT, "version": _VERSION, "tensors": json.dumps(shapes)}
    with atomic_write(path) as part:
        save_file(stored, str(part), metadata=metadata)
    return rows


@validated
def load_clustered(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict that `save_clustered` wrote, for ``model.load_state_dict``.

    Args:
        path: of a file from `save_clustered`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another kind or version, or damaged.
    """
    from safetensors import SafetensorError, safe_open  # loaded when a file is read

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            found = metadata.get("format"), metadata.get("version")
            if found != (_FORMAT, _VERSION):
                raise ValueError(
                    f"`load_clustered({str(path)!r})`: expected a file from `save_clustered`, version {_VERSION}, "
                    f"found format {found[0]!r}, version {found[1]}. Read other safetensors files with "
                    "`safetensors.torch.load_file`."
                )
            shapes: dict[str, list[int] | None] = json.loads(metadata["tensors"])
            return {name: _read(file, name, shape) for name, shape in shapes.items()}
    except SafetensorError as error:
        raise ValueError(
            f"`load_clustered({str(path)!r})`: expected a safetensors file from `save_clustered`, found another kind "
            f"or a damaged one ({error}). Write it again."
        ) from error


@validated
def clustered_sizes(model: nn.Module | Mapping[str, Tensor]) -> list[ClusteredTensor]:
    """Compute the size of each tensor of ``model`` in a file, without writing one."""
    return [_size(name, tensor, _coded(tensor)) for name, tensor in _state(model).items()]


def _state(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = model.state_dict() if isinstance(model, nn.Module) else model
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _size(name: str, tensor: Tensor, coded: _Coded | None) -> ClusteredTensor:
    count = max(tensor.numel(), 1)
    if coded is None:
        bits = 8 * tensor.nbytes / count
        return ClusteredTensor(name, tensor.numel(), 0, bits, bits)
    return ClusteredTensor(name, count, coded.centroids.shape[1], coded.entropy, 8 * coded.bytes / count)


def _coded(tensor: Tensor) -> _Coded | None:
    """Code ``tensor`` with one codebook, or one per row; None where that is no smaller."""
    for rows in dict.fromkeys((1, tensor.shape[0] if tensor.dim() > 1 else 1)):
        coded = _with_codebooks(tensor, rows)
        if coded is not None and coded.bytes < tensor.nbytes:
            return coded
    return None


def _with_codebooks(tensor: Tensor, rows: int) -> _Coded | None:
    """Code ``tensor`` with a codebook for each of ``rows``; None where there are too many values."""
    if not tensor.is_floating_point() or tensor.numel() < 2 * max(rows, 1):
        return None
    codebooks, assignments = [], []
    for row in tensor.reshape(rows, -1):
        values, inverse = _unique_values(row)
        if len(values) > _MOST_VALUES:
            return None
        codebooks.append(values)
        assignments.append(inverse)
    width = max(map(len, codebooks))
    centroids = torch.stack([torch.cat([book, book.new_zeros(width - len(book))]) for book in codebooks])
    symbols = torch.cat(assignments).numpy()
    counts = np.bincount(symbols, minlength=width).tolist()
    lengths = code_lengths(counts)
    codes = torch.frombuffer(bytearray(encode(symbols, lengths)), dtype=torch.uint8)
    return _Coded(centroids, torch.tensor(lengths, dtype=torch.uint8), codes, entropy(counts))


def _unique_values(row: Tensor) -> tuple[Tensor, Tensor]:
    """Distinguish values by their bits (a negative zero stays one), ordered by how often they occur."""
    pattern = row.view(_SAME_WIDTH[row.element_size()])
    bits, inverse, counts = torch.unique(pattern, return_inverse=True, return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order))
    return bits[order].view(row.dtype), ranks[inverse]


def _read(file: Any, name: str, shape: list[int] | None) -> Tensor:
    if shape is None:
        tensor: Tensor = file.get_tensor(name)
        return tensor
    centroids, lengths, codes = (file.get_tensor(f"{name}::{part}") for part in _PARTS)
    count = int(np.prod(shape))
    symbols = decode(codes.numpy().tobytes(), lengths.tolist(), count)
    restored: Tensor = centroids.gather(1, torch.from_numpy(symbols).reshape(len(centroids), -1)).reshape(shape)
    return restored
