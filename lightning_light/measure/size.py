"""How large a model is: as tensors in memory, as a file, and as a file after compression for download."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["deflated_bytes", "file_bytes", "tensor_bytes"]

_CHUNK = 1 << 20


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and of the buffers that a checkpoint keeps, each counted once.

    Zeros count as any other value. Weights that a quantized kernel has packed are no tensors and do not count:
    measure the exported file.

    Example:
        >>> tensor_bytes(nn.Linear(10, 10)), tensor_bytes(nn.Linear(10, 10, dtype=torch.float16))
        (440, 220)
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in _stored(model))


def file_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes of a file, or of all files below a folder.

    Raises:
        FileNotFoundError: there is no such path.
    """
    return sum(file.stat().st_size for file in _files(Path(path)))


def deflated_bytes(source: str | os.PathLike[str] | nn.Module) -> int:
    """Bytes after lossless compression (DEFLATE, as in a zip or an app package): the size of a download.

    Here zeros and repeated values do pay, which `tensor_bytes` and `file_bytes` do not show.

    Args:
        source: a file or folder, or a model, of which the stored tensors are taken.

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


def _stored(model: nn.Module) -> list[Tensor]:
    buffers = (
        buffer
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    )
    return list(dict.fromkeys((*model.parameters(), *buffers)))  # a tensor is equal only to itself as a key


def _tensor_chunks(model: nn.Module) -> Iterator[bytes]:
    for tensor in _stored(model):
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
