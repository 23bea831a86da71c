"""A progress bar for what takes minutes; nothing where nobody looks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

__all__ = ["watched"]

T = TypeVar("T")


def watched(items: Iterable[T], total: int, description: str, *, shown: bool) -> Iterable[T]:
    """``items``, with a bar that leaves the terminal when it is done."""
    console = Console(stderr=True)
    hidden = not (shown and console.is_terminal)
    return track(items, description, total=total, console=console, transient=True, disable=hidden)
