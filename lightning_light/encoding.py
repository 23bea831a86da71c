"""Dataclasses <-> plain types: what a checkpoint keeps, validated when it is read."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, TypedDict, TypeVar, Union, get_args, get_origin

from typing_extensions import Self

from lightning_light.errors import ManifestError
from lightning_light.schema import check_schema, hints_of

__all__ = ["Extensible", "decode", "encode", "subclasses"]

E = TypeVar("E")


class Extensible:
    """Base of dataclasses that are encoded with the name of their class: a user may define further subclasses."""

    @classmethod
    def kind(cls) -> str:
        """Return the name of the class in a checkpoint."""
        return f"{cls.__module__}.{cls.__qualname__}"

    @classmethod
    def subclass(cls, name: str) -> type[Self]:
        """Return the subclass whose `kind` is ``name``.

        Raises:
            ManifestError: it has not been imported.
        """
        kinds = {kind.kind(): kind for kind in subclasses(cls)}
        if name not in kinds:
            raise ManifestError(
                f"A checkpoint with the {cls.__name__.lower()} `{name}`: expected an imported subclass of "
                f"`{cls.__name__}`, found {', '.join(sorted(kinds))}. Import the module that defines it, then load."
            )
        return kinds[name]


def subclasses(kind: type[E]) -> list[type[E]]:
    """List the classes that derive from ``kind``, as far as they are imported."""
    direct = kind.__subclasses__()
    return [*direct, *(inner for derived in direct for inner in subclasses(derived))]


def encode(value: Any) -> Any:
    """Return a dataclass as dicts, lists, tuples, numbers and strings; a dict with tuples as keys is a list of pairs.

    Example:
        >>> from lightning_light.quantization.observers import Percentile
        >>> encode(Percentile(0.99))
        {'fraction': 0.99, 'momentum': 0.01, 'kind': 'Percentile'}
    """
    if is_dataclass(value) and not isinstance(value, type):
        found = {field.name: encode(getattr(value, field.name)) for field in fields(value) if field.init}
        return {**found, "kind": value.kind()} if isinstance(value, Extensible) else found
    if isinstance(value, dict):
        pairs = [(encode(key), encode(item)) for key, item in value.items()]
        return pairs if any(isinstance(key, tuple) for key in value) else dict(pairs)
    if isinstance(value, tuple):
        return tuple(map(encode, value))
    return list(map(encode, value)) if isinstance(value, list) else value


def decode(kind: Any, plain: Any, path: str) -> Any:
    """Return what `encode` has written as a value of the type ``kind``.

    Args:
        kind: a type, as in an annotation.
        plain: of a checkpoint.
        path: where it is found in the checkpoint, for errors.

    Raises:
        ManifestError: ``plain`` is of another form, or names a class that has not been imported; the error names it.
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
    if isinstance(kind, type) and issubclass(kind, Extensible):
        check_schema(plain, dict[str, Any], path)
        check_schema(plain.get("kind"), str, f"{path}.kind")
        values = {name: value for name, value in plain.items() if name != "kind"}
        return _decode_dataclass(kind.subclass(plain["kind"]), values, path)
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
