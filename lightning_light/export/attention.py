"""Attention as plain operations, while a network is written to a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["plain_attention"]


@contextmanager
def plain_attention() -> Iterator[None]:
    """Write attention as plain operations: its fused form is not in every mobile runtime."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
