"""Print above the progress bars of tqdm and rich, so that no line overwrites another."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any

__all__ = ["above_progress_bar"]


@contextmanager
def above_progress_bar(logger: logging.Logger | None = None) -> Iterator[None]:
    """Inside, everything printed, warned, or logged to the terminal appears in lines of its own above the bars.

    Bars write to standard output; warnings and log handlers write to standard error, at the end of the bar's line. A
    stream that goes elsewhere, for instance to a file, is left alone.

    Args:
        logger: whose handlers, and those of its parents, write above the bars as well.
    """
    with ExitStack() as stack:
        if _shares_file(sys.stderr, sys.stdout):
            if _has_tqdm_bar():
                from tqdm.contrib import DummyTqdmFile

                above = DummyTqdmFile(sys.stdout)
                stack.enter_context(redirect_stdout(above))
                stack.enter_context(redirect_stderr(above))
            for handler in _terminal_handlers(logger):  # `rich` redirects the streams, but not those of handlers
                stack.callback(handler.setStream, handler.stream)
                handler.setStream(sys.stderr)
        yield


def _has_tqdm_bar() -> bool:
    return "tqdm" in sys.modules and bool(getattr(sys.modules["tqdm"].tqdm, "_instances", ()))


def _terminal_handlers(logger: logging.Logger | None) -> Iterator[logging.StreamHandler[Any]]:
    """Yield the handlers of ``logger`` and its parents that write to the terminal that the bars are on."""
    while logger is not None:
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and _shares_file(handler.stream, sys.stdout):
                yield handler
        logger = logger.parent if logger.propagate else None


def _shares_file(first: Any, second: Any) -> bool:
    """Check whether two streams write to the same terminal, pipe or file."""
    try:
        return os.path.sameopenfile(first.fileno(), second.fileno())
    except (AttributeError, OSError, ValueError):  # a stream without a file, such as a notebook's
        return False
