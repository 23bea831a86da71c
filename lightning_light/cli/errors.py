"""Turn the errors of files, runtimes and users' classes into one sentence."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_light.errors import LightningLightError

__all__ = ["CommandError", "as_command_error", "expecting"]

_LONGEST = 400
_FOREIGN = (
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


class CommandError(LightningLightError, ValueError):
    """A command cannot do what its arguments require."""


@contextmanager
def expecting(subject: str, expectation: str, advice: str = "") -> Iterator[None]:
    """Raise a `CommandError` for an error of a file, a runtime or a class inside; those of this package pass.

    Of a long message the first sentence is repeated.

    Example:
        >>> with expecting("a.json", "JSON", "Export again."):
        ...     raise ValueError("no such text")
        Traceback (most recent call last):
        lightning_light.cli.errors.CommandError: `a.json`: expected JSON, found ValueError: no such text. Export again.
    """
    try:
        yield
    except LightningLightError:
        raise
    except (*_FOREIGN, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        text = " ".join(str(error).split()).partition(". ")[0].rstrip(".")[:_LONGEST]
        found = f"{type(error).__name__}: {text}" if text else type(error).__name__
        raise CommandError(f"`{subject}`: expected {expectation}, found {found}. {advice}".rstrip()) from error


@contextmanager
def as_command_error() -> Iterator[None]:
    """Raise a `CommandError` for a `ValueError` of this package, with the same sentence."""
    try:
        yield
    except ValueError as error:
        raise CommandError(str(error)) from error
