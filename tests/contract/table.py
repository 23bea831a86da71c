"""The table: every ``CASES`` of every file in ``cases/``."""

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pytest

import lightning_light
import lightning_light.callback
from tests.contract import cases
from tests.contract.case import Case


def all_cases() -> list[Case]:
    """In the order of the files' names."""
    files = sorted(module.name for module in pkgutil.iter_modules(cases.__path__))
    return [case for file in files for case in importlib.import_module(f"{cases.__name__}.{file}").CASES]


def rows_for_every_contract(rows: list[Case]) -> Iterator[Any]:
    """For ``parametrize``: the first full row of every callback is fast, its others are slow."""
    seen: set[type[Any]] = set()
    for case in rows:
        if case.full:
            method = type(case.build(Path(gettempdir()))[0])
            yield pytest.param(case, id=case.name, marks=[pytest.mark.slow] if method in seen else [])
            seen.add(method)


CASES = all_cases()
FULL = list(rows_for_every_contract(CASES))


def public_callbacks() -> set[type[Any]]:
    """Every method that `lightning_light` and its subpackages list."""
    names = [module.name for module in pkgutil.iter_modules(lightning_light.__path__) if module.ispkg]
    subpackages = [importlib.import_module(f"lightning_light.{name}") for name in names]
    found = set()
    for package in [lightning_light, *subpackages]:
        values = [getattr(package, name) for name in getattr(package, "__all__", ())]
        found |= {value for value in values if isinstance(value, type) and _is_method(value)}
    return found


def _is_method(value: type[Any]) -> bool:
    base = lightning_light.callback.CompressionCallback
    return issubclass(value, base.__mro__[1]) and value is not base
