"""Silence known warnings of other packages, and no others."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["ignored_warnings"]


@contextmanager
def ignored_warnings(*patterns: str) -> Iterator[None]:
    """Ignore warnings whose message begins with one of the regular expressions ``patterns``.

    Example:
        >>> import warnings
        >>> with ignored_warnings("This API is experimental"):
        ...     warnings.warn("This API is experimental, and may change.")
    """
    with warnings.catch_warnings():
        for pattern in patterns:
            warnings.filterwarnings("ignore", pattern)
        yield
