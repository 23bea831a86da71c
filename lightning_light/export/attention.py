"""Export attention as plain operators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["plain_attention"]


@contextmanager
def plain_attention() -> Iterator[None]:
    """Disable fused attention, which not every mobile runtime has, so that it is exported as plain operators."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
