"""Dataclasses <-> plain types: what a checkpoint keeps, validated when it is read."""

from __future__ import annotations

import types
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from torch import Tensor

from lightning_light.errors import LightningLightError, ManifestError
from lightning_light.quantization.observers import Observer
from lightning_light.surgery.schema import check_schema, hints_of

__all__ = ["decode", "encode"]


def encode(value: Any) -> Any:
    """A dataclass as dicts, lists, numbers and strings; a dict with other keys than strings as pairs.

    Example:
        >>> from lightning_light.quantization.observers import Percentile
        >>> encode(Percentile(0.99))
        {'fraction': 0.99, 'momentum': 0.01, 'kind': 'Percentile'}
    """
    if is_dataclass(value) and not isinstance(value, type):
        found = {field.name: encode(getattr(value, field.name)) for field in fields(value)}
        return {**found, "kind": value.kind()} if isinstance(value, Observer) else found
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: encode(item) for key, item in value.items()}
        return [[encode(key), encode(item)] for key, item in value.items()]
    return [encode(item) for item in value] if isinstance(value, list | tuple) else value


def decode(kind: Any, plain: Any, path: str) -> Any:
    """What `encode` has written, as a ``kind``.

    Args:
        kind: a type, as in an annotation.
        plain: of a checkpoint.
        path: where it is found in the checkpoint, for errors.

    Raises:
        ManifestError: ``plain`` is of another form; the error names the part.
        LightningLightError: it names an observer that has not been imported.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        value = decode(parts[0], plain, path)
        check_schema(value, kind, path)
        return value
    if origin is Literal:
        return _checked(plain in parts, plain, path, kind, plain)
    if origin in (Union, types.UnionType):
        return _decode_union(parts, plain, path, kind)
    if origin is list:
        _checked(isinstance(plain, list), plain, path, kind)
        return [decode(parts[0], item, f"{path}[{place}]") for place, item in enumerate(plain)]
    if origin is dict:
        return _decode_dict(parts, plain, path, kind)
    if isinstance(kind, type) and issubclass(kind, tuple):
        hints = hints_of(kind)
        _checked(isinstance(plain, list) and len(plain) == len(hints), plain, path, kind)
        return kind(*(decode(hint, item, path) for hint, item in zip(hints.values(), plain, strict=True)))
    if isinstance(kind, type) and issubclass(kind, Observer):
        return _decode_observer(plain, path)
    if is_dataclass(kind):
        return _decode_dataclass(kind, plain, path)
    fits = isinstance(plain, kind) and not (isinstance(plain, bool) and kind is not bool)
    return _checked(fits or (kind is float and type(plain) is int), plain, path, kind, plain)


def _decode_union(parts: tuple[Any, ...], plain: Any, path: str, kind: Any) -> Any:
    if plain is None:
        return _checked(type(None) in parts, plain, path, kind)
    (other,) = (part for part in parts if part is not type(None))
    return decode(other, plain, path)


def _decode_dict(parts: tuple[Any, ...], plain: Any, path: str, kind: Any) -> Any:
    if isinstance(plain, dict) and parts[0] is str:
        return {decode(str, key, path): decode(parts[1], item, f"{path}[{key!r}]") for key, item in plain.items()}
    if plain == {}:
        return {}
    _checked(isinstance(plain, list) and all(isinstance(i, list) and len(i) == 2 for i in plain), plain, path, kind)
    return {decode(parts[0], key, path): decode(parts[1], item, f"{path}[{key}]") for key, item in plain}


def _decode_dataclass(kind: Any, plain: Any, path: str) -> Any:
    _checked(isinstance(plain, dict), plain, path, kind)
    hints, names = hints_of(kind), [field.name for field in fields(kind)]
    missing = [name for name in names if name not in plain]
    _checked(not missing, f"no {', '.join(missing)}", path, kind)
    values = {name: decode(hints[name], plain[name], f"{path}.{name}") for name in names}
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:  # of a class that checks its arguments
        return _checked(False, str(error), path, kind)


def _decode_observer(plain: Any, path: str) -> Observer:
    _checked(isinstance(plain, dict) and "kind" in plain, plain, path, Observer)
    kind = Observer.kinds.get(plain["kind"]) if isinstance(plain["kind"], str) else None
    if kind is None:
        raise LightningLightError(
            f"A checkpoint with the observer `{plain['kind']}`: expected its class to be defined, found "
            f"{sorted(Observer.kinds)}. Import it before you load."
        )
    found: Observer = _decode_dataclass(kind, plain, path)
    return found


def _checked(fits: bool, found: Any, path: str, kind: Any, value: Any = None) -> Any:
    if not fits:
        shown = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)
        name = getattr(kind, "__name__", None) if get_origin(kind) is None else None
        raise ManifestError(
            f"The checkpoint's state `{path}`: expected {name or kind}, found {shown[:200]}. It is damaged, or was "
            "written by another version: take an earlier checkpoint, or quantize again."
        )
    return value
