"""Turn the errors of files, runtimes and users' classes into one sentence."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_light.errors import LightningLightError

__all__ = ["CommandError", "expecting"]

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
    except _FOREIGN as error:
        found = " ".join(f"{type(error).__name__}: {error}".split())
        found = found if len(found) <= _LONGEST else f"{found[:_LONGEST]}…"
        raise CommandError(
            f"`{subject}`: expected {expectation}, found {found.rstrip('.')}. {advice}".rstrip()
        ) from error
