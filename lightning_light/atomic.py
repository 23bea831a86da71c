"""Write files whole or not at all."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

__all__ = ["atomic_save", "atomic_write"]


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a path of the same name in a temporary folder beside ``path``; the finished file is moved to ``path``.

    An interrupted process, a full disk or a read-only folder leaves the file that was there before as it was.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_write(f"{folder}/report.txt") as part:
        ...         _ = part.write_text("whole")
        ...     [file.name for file in Path(folder).iterdir()]
        ['report.txt']
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as folder:  # two runs may write at once
        part = Path(folder) / path.name  # some formats store the name
        yield part
        part.replace(path)


def atomic_save(value: Any, path: str | Path) -> None:
    """Call ``torch.save``, in memory first: its own writer ends the process where a disk is full."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with atomic_write(path) as part:
        part.write_bytes(buffer.getbuffer())
