"""Turn the errors of files, runtimes and users' classes into one sentence, in the terms of the command."""

from __future__ import annotations

import ast
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from lightning_light.errors import LightningLightError

__all__ = ["CommandError", "as_command_error", "command_line", "expecting", "write_warnings"]

_LONGEST = 400
_FOREIGN = (
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    OSError,
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
    except _foreign() as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        text = " ".join(str(error).split()).partition(". ")[0].rstrip(".")[:_LONGEST]
        found = f"{type(error).__name__}: {text}" if text else type(error).__name__
        raise CommandError(f"`{subject}`: expected {expectation}, found {found}. {advice}".rstrip()) from error


def _foreign() -> tuple[type[Exception], ...]:
    from lightning_light.host.classes import host_classes  # imports Lightning, which `--help` does not need

    return (*_FOREIGN, *host_classes("utilities.exceptions.MisconfigurationException"))


@contextmanager
def as_command_error() -> Iterator[None]:
    """Raise a `CommandError` for a `ValueError` of this package, with the same sentence."""
    try:
        yield
    except ValueError as error:
        raise CommandError(str(error)) from error


def command_line(message: str, options: Collection[str]) -> str:
    """Return a message on one line; Python arguments in it that are options of the command are written as such.

    Example:
        >>> command_line("Write `batch='one'`, or `parity=Tolerance(absolute=...)`.", ["batch", "absolute"])
        'Write `--batch one`, or `--absolute ...`.'
        >>> command_line("`MACs(remaining=3.0)`: expected 0 < remaining <= 1.", ["macs"])
        '`--macs 3.0`: expected 0 < remaining <= 1.'
    """
    return re.sub(r"`([^`]+)`", lambda code: f"`{_as_options(code[1], options)}`", " ".join(message.split()))


@contextmanager
def write_warnings(options: Collection[str]) -> Iterator[None]:
    """Write warnings as errors are written, on one line; those of other packages that concern code are left out."""
    with warnings.catch_warnings(record=True) as caught:
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        try:
            yield
        finally:
            for message in dict.fromkeys(str(each.message) for each in caught):
                sys.stderr.write(f"lightning-light: warning: {command_line(message, options)}\n")


def _as_options(code: str, options: Collection[str]) -> str:
    """Write ``batch='one'`` as ``--batch one``, and ``MACs(0.4)`` as ``--macs 0.4``; other code stays."""
    try:
        nodes = list(ast.walk(ast.parse(f"_({code})", mode="eval")))
    except SyntaxError:
        return code
    found = [(each.arg, each.value) for each in nodes if isinstance(each, ast.keyword) and each.arg in options]
    for call in nodes:
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
            values = [*call.args, *(each.value for each in call.keywords)]
            named = [name for name in options if call.func.id.lower().endswith(name)]
            found += [(name, values[0]) for name in named if len(values) == 1]
    return " ".join(f"--{name}{_value(node)}" for name, node in found) or code


def _value(node: ast.expr) -> str:
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return ""
    if isinstance(value, tuple | list):
        return "".join(f" {each}" for each in value)
    return " ..." if value is ... else f" {value}"
