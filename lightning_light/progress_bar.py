"""A progress bar, where there is a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

__all__ = ["with_progress_bar"]

T = TypeVar("T")


def with_progress_bar(items: Iterable[T], total: int, description: str, *, shown: bool) -> Iterable[T]:
    """``items``, with a bar that is removed when it is done."""
    console = Console(stderr=True)
    hidden = not (shown and console.is_terminal)
    return track(items, description, total=total, console=console, transient=True, disable=hidden)
