"""Dataclasses <-> plain types: what a checkpoint keeps, validated when it is read."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, TypedDict, Union, get_args, get_origin

from lightning_light.errors import LightningLightError, ManifestError
from lightning_light.quantization.observers import Observer
from lightning_light.schema import check_schema, hints_of

__all__ = ["decode", "encode"]


def encode(value: Any) -> Any:
    """A dataclass as dicts, lists, tuples, numbers and strings; a dict with tuples as keys as pairs.

    Example:
        >>> from lightning_light.quantization.observers import Percentile
        >>> encode(Percentile(0.99))
        {'fraction': 0.99, 'momentum': 0.01, 'kind': 'Percentile'}
    """
    if is_dataclass(value) and not isinstance(value, type):
        found = {field.name: encode(getattr(value, field.name)) for field in fields(value) if field.init}
        return {**found, "kind": value.kind()} if isinstance(value, Observer) else found
    if isinstance(value, dict):
        pairs = [(encode(key), encode(item)) for key, item in value.items()]
        return pairs if any(isinstance(key, tuple) for key in value) else dict(pairs)
    if isinstance(value, tuple):
        return tuple(map(encode, value))
    return list(map(encode, value)) if isinstance(value, list) else value


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
    if origin in (Union, UnionType) and plain is not None:
        (kind,) = (part for part in parts if part is not NoneType)
        return decode(kind, plain, path)
    if origin is list:
        check_schema(plain, list[Any], path)
        return [decode(parts[0], item, f"{path}[{place}]") for place, item in enumerate(plain)]
    if origin is dict:
        check_schema(plain, list[tuple[Any, Any]] if isinstance(plain, list) else dict[Any, Any], path)
        pairs = plain if isinstance(plain, list) else plain.items()
        return {decode(parts[0], key, path): decode(parts[1], item, f"{path}[{key!r}]") for key, item in pairs}
    if hasattr(kind, "_fields"):
        check_schema(plain, tuple[tuple(hints_of(kind).values())], path)  # type: ignore[misc]
        return kind(*plain)
    if kind is Observer:
        return _decode_observer(plain, path)
    if is_dataclass(kind):
        return _decode_dataclass(kind, plain, path)
    check_schema(plain, kind, path)
    return plain


def _decode_dataclass(kind: Any, plain: Any, path: str) -> Any:
    names, hints = [field.name for field in fields(kind) if field.init], hints_of(kind)
    check_schema(plain, TypedDict(kind.__name__, dict.fromkeys(names, Any)), path)  # type: ignore[operator]
    values = {name: decode(hints[name], plain[name], f"{path}.{name}") for name in names}
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:  # of a class that checks its arguments
        raise ManifestError(f"The checkpoint's manifest is damaged at `{path}`: {error}") from error


def _decode_observer(plain: Any, path: str) -> Any:
    check_schema(plain, dict[str, Any], path)
    check_schema(plain.get("kind"), str, f"{path}.kind")
    kind = Observer.kinds.get(plain["kind"])
    if kind is None:
        raise LightningLightError(
            f"A checkpoint with the observer `{plain['kind']}`: expected its class to be defined, found "
            f"{sorted(Observer.kinds)}. Import it before you load."
        )
    return _decode_dataclass(kind, {name: value for name, value in plain.items() if name != "kind"}, path)
