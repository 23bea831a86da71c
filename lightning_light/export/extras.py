"""Check that the packages of an extra are installed and compatible with this torch."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lightning_light.errors import UnsupportedError

__all__ = ["check_pair", "need", "version_of"]


def need(call: str, extra: str, *packages: str) -> None:
    """Import ``packages``, so that a missing or broken one is found before anything is trained.

    Raises:
        UnsupportedError: names the package and its extra.

    Example:
        >>> need("Paper()", "paper", "json", "no_such_package")
        Traceback (most recent call last):
        lightning_light.errors.UnsupportedError: `Paper()`: expected the packages json, no_such_package, found that
        no_such_package cannot be imported (No module named 'no_such_package'). Install them:
        `pip install lightning-light[paper]`.
    """
    for package in packages:
        try:
            with _quiet():
                importlib.import_module(package)
        except ImportError as error:
            raise UnsupportedError(
                f"`{call}`: expected the packages {', '.join(packages)}, found that {package} cannot be imported "
                f"({error}). Install them: `pip install lightning-light[{extra}]`."
            ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings and logs of other packages during their import."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def version_of(package: str) -> str:
    """Return the installed version, without importing the package."""
    return importlib.metadata.version(package)


def check_pair(call: str, package: str, version: str, torch: str, pairs: Sequence[tuple[str, str]]) -> None:
    """Check that the release of ``package`` was built for this torch.

    Args:
        call: the exporter, as the user wrote it.
        package: name of the package.
        version: its version.
        torch: torch's version.
        pairs: compatible releases of the package and of torch, each as ``major.minor``; the oldest first.

    Raises:
        UnsupportedError: names both versions, and a pair that works.

    Example:
        >>> check_pair("ExecuTorch()", "executorch", "1.4.1", "2.13.0+cpu", [("1.4", "2.13")])
        >>> check_pair("ExecuTorch()", "executorch", "1.5.0", "2.13.0", [("1.4", "2.13"), ("1.5", "2.15")])
        Traceback (most recent call last):
        lightning_light.errors.UnsupportedError: `ExecuTorch()`: expected executorch and torch of one pair (1.4 with
        2.13, 1.5 with 2.15), found 1.5.0 with 2.13.0. Install `executorch==1.4.*`, which goes with this torch.
    """
    if (_release(version), _release(torch)) in pairs:
        return
    known = ", ".join(f"{release} with {partner}" for release, partner in pairs)
    fitting = [release for release, partner in pairs if partner == _release(torch)]
    newest, newest_torch = pairs[-1]
    cure = (
        f"Install `{package}=={fitting[-1]}.*`, which goes with this torch."
        if fitting
        else f"Install `{package}=={newest}.*` and `torch=={newest_torch}.*`."
    )
    raise UnsupportedError(
        f"`{call}`: expected {package} and torch of one pair ({known}), found {version} with {torch}. {cure}"
    )


def _release(version: str) -> str:
    return ".".join(version.split(".")[:2])
