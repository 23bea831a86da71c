"""A progress bar, where there is a terminal or a notebook."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

__all__ = ["with_progress_bar"]

T = TypeVar("T")


def with_progress_bar(items: Iterable[T], total: int, description: str, *, shown: bool) -> Iterable[T]:
    """``items``, with a bar that is removed when it is done."""
    from tqdm import tqdm

    in_notebook = type(sys.stderr).__module__.startswith("ipykernel")
    hidden = not (shown and (sys.stderr.isatty() or in_notebook))
    bar: Iterable[T] = tqdm(items, description, total, leave=False, disable=hidden, dynamic_ncols=True)
    return bar
