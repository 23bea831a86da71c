"""Objects <-> LightningCLI's notation: what a run is made of, as YAML."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any

from lightning_light.errors import UnsupportedError
from lightning_light.host.classes import host_class, is_host

__all__ = ["as_config", "callbacks_from", "kept_arguments"]


def as_config(value: Any) -> Any:
    """Return a value as it is written in a config of LightningCLI.

    Args:
        value: a plain value, a container, a dataclass of this package or of the user, or a callback. Arguments are read
            from the attributes of the same name.

    Raises:
        UnsupportedError: it is another object, or does not keep an argument of its constructor.

    Example:
        >>> from lightning_light.schedules import OneShot
        >>> as_config([OneShot(at=0.5), 1])
        [{'class_path': 'lightning_light.schedules.OneShot', 'init_args': {'at': 0.5}}, 1]
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {key: as_config(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [as_config(item) for item in value]
    if not is_dataclass(value) and not is_host(value, "Callback"):
        raise _unwritable(value, "it is neither a plain value, a dataclass, nor a callback")
    arguments, missing = kept_arguments(value)
    if missing:
        raise _unwritable(value, f"it has no attribute with its argument `{missing[0]}`")
    kind = next(kind for kind in type(value).__mro__ if not kind.__name__.startswith("_"))
    return {
        "class_path": f"{kind.__module__}.{kind.__qualname__}",
        "init_args": {name: as_config(argument) for name, argument in arguments.items()},
    }


def kept_arguments(value: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the arguments of a constructor that ``value`` keeps as attributes or in ``hparams``, and missing names."""
    kept = {**getattr(value, "__dict__", {}), **dict(getattr(value, "hparams_initial", {}))}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(type(value).__init__).parameters.values()
    names = [one.name for one in parameters if one.name != "self" and one.kind not in variadic]
    private = {name: f"_{name}" for name in names if name not in kept and f"_{name}" in kept}
    found = {name: kept[private.get(name, name)] for name in names if name in kept or name in private}
    return found, [name for name in names if name not in found]


def callbacks_from(config: Sequence[Any], module: Any) -> list[Any]:
    """Build callbacks as LightningCLI does, for the host of ``module``; short class names are known.

    Raises:
        ValueError: a class or an argument that LightningCLI would refuse.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    host_class(module, "cli.LightningCLI")  # loads all names that it knows
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[host_class(module, "Callback")])  # type: ignore[misc]
    build = getattr(parser, "instantiate", None) or parser.instantiate_classes
    try:
        return list(build(parser.parse_object({"callbacks": list(config)})).callbacks)
    except ArgumentError as error:
        raise ValueError(f"`tune(space=...)`: expected callbacks as LightningCLI reads them, found: {error}") from error


def _unwritable(value: Any, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"`tune(...)` with `{type(value).__name__}`: expected what can be written as YAML, found that {reason}. Keep "
        "constructor arguments in attributes of the same name, or write the space as YAML with `class_path`."
    )
