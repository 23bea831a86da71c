"""Validate plain values against type annotations: what a checkpoint holds is checked before it is used."""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from torch import Tensor

from lightning_light.errors import ManifestError

__all__ = ["check_schema"]


def check_schema(value: Any, annotation: Any, path: str) -> None:
    """Check that ``value`` is what ``annotation`` says.

    Args:
        value: plain containers, numbers, strings and tensors.
        annotation: a type, ``X | None``, ``Literal``, ``list[X]``, ``tuple[X, ...]``, ``dict[K, V]`` or a `TypedDict`,
            nested as needed. ``float`` admits an int; ``Any`` everything.
        path: of the value, for the message.

    Raises:
        ManifestError: names the part that does not fit, what was expected and what was found.

    Example:
        >>> check_schema({"step": 3, "masks": {}}, dict[str, int], "state['pruning']")
        Traceback (most recent call last):
            ...
        lightning_light.errors.ManifestError: The checkpoint's manifest is damaged at `state['pruning']['masks']`: ...
    """
    if annotation is Any or _is_sound(value, annotation, path):
        return
    found = type(value).__name__ if isinstance(value, (dict, list, tuple, Tensor)) else f"{value!r}"[:60]
    raise ManifestError(
        f"The checkpoint's manifest is damaged at `{path}`: expected {_name(annotation)}, found {found}. Use another "
        "checkpoint of the run."
    )


def _is_sound(value: Any, annotation: Any, path: str) -> bool:
    """Check one level; what lies inside is checked by `check_schema`, which raises."""
    if is_typeddict(annotation):
        return isinstance(value, dict) and _check_keys(value, annotation, path)
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        return _check_union(value, get_args(annotation), path)
    if origin is Literal:
        return value in get_args(annotation)
    if origin is not None:
        return _CONTAINERS[origin](value, get_args(annotation), path)
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, NoneType if annotation is None else annotation)


def _check_union(value: Any, options: tuple[Any, ...], path: str) -> bool:
    """With one option besides None, what lies inside is named in the message."""
    if value is None:
        return NoneType in options
    others = [option for option in options if option is not NoneType]
    if len(others) > 1:
        return any(_admits(value, option, path) for option in others)
    check_schema(value, others[0], path)
    return True


def _admits(value: Any, option: Any, path: str) -> bool:
    try:
        check_schema(value, option, path)
    except ManifestError:
        return False
    return True


def _check_keys(value: dict[str, Any], annotation: Any, path: str) -> bool:
    hints = get_type_hints(annotation)
    for key in sorted(annotation.__required_keys__ - value.keys()):
        raise ManifestError(f"The checkpoint's manifest is damaged at `{path}`: expected the key {key!r}, found none.")
    for key in sorted(map(str, value.keys() - hints.keys())):
        raise ManifestError(
            f"The checkpoint's manifest is damaged at `{path}`: expected keys among {sorted(hints)}, found {key!r}."
        )
    for key, item in value.items():
        check_schema(item, hints[key], f"{path}[{key!r}]")
    return True


def _check_dict(value: Any, arguments: tuple[Any, ...], path: str) -> bool:
    if not isinstance(value, dict):
        return False
    for key, item in value.items():
        check_schema(key, arguments[0], f"{path}, key {key!r}")
        check_schema(item, arguments[1], f"{path}[{key!r}]")
    return True


def _check_list(value: Any, arguments: tuple[Any, ...], path: str) -> bool:
    if not isinstance(value, list):
        return False
    for place, item in enumerate(value):
        check_schema(item, arguments[0], f"{path}[{place}]")
    return True


def _check_tuple(value: Any, arguments: tuple[Any, ...], path: str) -> bool:
    """A tuple of any length, ``tuple[X, ...]``, or with one annotation per item."""
    if not isinstance(value, tuple):
        return False
    items = [arguments[0]] * len(value) if arguments[1:] == (...,) else list(arguments)
    if len(items) != len(value):
        return False
    for place, (item, annotation) in enumerate(zip(value, items, strict=True)):
        check_schema(item, annotation, f"{path}[{place}]")
    return True


_CONTAINERS: dict[Any, Callable[[Any, tuple[Any, ...], str], bool]] = {
    dict: _check_dict,
    list: _check_list,
    tuple: _check_tuple,
}


def _name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)
