"""Measure the size of a model: as tensors, as a file, and as a file after lossless compression."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_light.validation import validated

__all__ = ["deflated_bytes", "file_bytes", "stored_tensors", "tensor_bytes"]

_CHUNK = 1 << 20


@validated
def tensor_bytes(model: nn.Module) -> int:
    """Count the bytes of all parameters and persistent buffers, each once.

    Zeros count as any other value. Packed weights of quantized kernels are not tensors and do not count: measure the
    exported file.

    Args:
        model: any module.

    Example:
        >>> tensor_bytes(nn.Linear(10, 10)), tensor_bytes(nn.Linear(10, 10, dtype=torch.float16))
        (440, 220)
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in stored_tensors(model).values())


@validated
def file_bytes(path: str | os.PathLike[str]) -> int:
    """Count the bytes of a file, or of all files below a folder.

    Args:
        path: of a file or folder.

    Raises:
        FileNotFoundError: there is no such path.
    """
    return sum(file.stat().st_size for file in _files(Path(path)))


@validated
def deflated_bytes(source: str | os.PathLike[str] | nn.Module) -> int:
    """Count the bytes after lossless compression (DEFLATE, as in a zip or an app package): the download size.

    Zeros and repeated values reduce it, unlike `tensor_bytes` and `file_bytes`.

    Args:
        source: a file or folder, or a model, whose parameters and persistent buffers are compressed.

    Raises:
        FileNotFoundError: there is no such path.

    Example:
        >>> layer = nn.Linear(100, 100)
        >>> dense = deflated_bytes(layer)
        >>> deflated_bytes(layer.apply(lambda module: nn.init.zeros_(module.weight))) < dense / 10
        True
    """
    chunks = _tensor_chunks(source) if isinstance(source, nn.Module) else _file_chunks(Path(source))
    compressor = zlib.compressobj()
    return sum(len(compressor.compress(chunk)) for chunk in chunks) + len(compressor.flush())


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, and the buffers that a checkpoint keeps, each once, by the first of its names."""
    buffers = (
        (f"{prefix}.{name}".removeprefix("."), buffer)
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    )
    names: dict[Tensor, str] = {}  # a tensor is equal only to itself as a key
    for name, tensor in (*model.named_parameters(), *buffers):
        names.setdefault(tensor, name)
    return {name: tensor for tensor, name in names.items()}


def _tensor_chunks(model: nn.Module) -> Iterator[bytes]:
    for tensor in stored_tensors(model).values():
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        for start in range(0, flat.numel(), _CHUNK):
            yield bytes(flat[start : start + _CHUNK].numpy())


def _file_chunks(path: Path) -> Iterator[bytes]:
    for file in _files(path):
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    if not path.exists():
        raise FileNotFoundError(f"`{path}`: expected a file or a folder, found nothing there. Export the model first.")
    return [path]
