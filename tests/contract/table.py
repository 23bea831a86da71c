"""The table: every ``CASES`` of every file in ``cases/``."""

import importlib
import pkgutil
from typing import Any

import lightning_light
import lightning_light.callback
from tests.contract import cases
from tests.contract.case import Case


def all_cases() -> list[Case]:
    """In the order of the files' names."""
    files = sorted(module.name for module in pkgutil.iter_modules(cases.__path__))
    return [case for file in files for case in importlib.import_module(f"{cases.__name__}.{file}").CASES]


CASES = all_cases()
FULL = [case for case in CASES if case.full]


def public_callbacks() -> set[type[Any]]:
    """Every method that `lightning_light` and its wings list."""
    wings = [module for module in pkgutil.iter_modules(lightning_light.__path__) if module.ispkg]
    found = set()
    for package in [lightning_light, *(importlib.import_module(f"lightning_light.{wing.name}") for wing in wings)]:
        values = [getattr(package, name) for name in getattr(package, "__all__", ())]
        found |= {value for value in values if isinstance(value, type) and _is_method(value)}
    return found


def _is_method(value: type[Any]) -> bool:
    base = lightning_light.callback.CompressionCallback
    return issubclass(value, base.__mro__[1]) and value is not base
