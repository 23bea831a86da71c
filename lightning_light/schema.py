"""Validate plain values against type annotations: what a checkpoint holds is checked before it is used."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lightning_light.errors import ManifestError
from lightning_light.validation import Constraint

__all__ = [
    "Context",
    "FieldsOf",
    "LayerName",
    "Length",
    "LikeTensors",
    "Needs",
    "PlainExample",
    "Rule",
    "TensorOf",
    "Within",
    "check_schema",
    "damage",
    "hints_of",
]

_DTYPES: dict[str, Callable[[torch.dtype], bool]] = {
    "bool": lambda dtype: dtype == torch.bool,
    "integer": lambda dtype: not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool,
    "float": lambda dtype: dtype.is_floating_point,
    "real": lambda dtype: not dtype.is_complex,
}
Kind = Literal["bool", "integer", "float", "real"]


@dataclass(frozen=True)
class Context:
    """What a rule may compare a value with.

    Attributes:
        shapes: of the tensors of the network that the checkpoint is of, by name; None where it is not known.
        layers: names of its modules.
        holder: the dict that holds the value.
    """

    shapes: Mapping[str, torch.Size] | None = None
    layers: frozenset[str] = frozenset()
    holder: Mapping[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, network: nn.Module, weights: Mapping[str, Any]) -> Context:
        """Return that of a network, or of a copy of its structure; ``weights`` have the shapes of its lazy layers."""
        tensors = (*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False))
        known = {name: weights.get(name) if is_lazy(tensor) else tensor for name, tensor in tensors}
        shapes = {name: tensor.shape for name, tensor in known.items() if isinstance(tensor, Tensor)}
        return cls(shapes, frozenset(name for name, _ in network.named_modules(remove_duplicate=False)))


class Rule(ABC):
    """A condition on a value beside its type: ``Annotated[dict[str, Tensor], LikeTensors("bool")]``."""

    @abstractmethod
    def check(self, value: Any, context: Context, path: str) -> None:
        """Raise a `ManifestError`, as of `damage`, unless ``value``, which has the right type, is sound."""


@dataclass(frozen=True)
class TensorOf(Rule):
    """A tensor of a kind and a number of dimensions, with finite values from ``low`` on.

    Attributes:
        kind: of its type; ``"real"`` admits all but complex ones.
        ndim: number of dimensions; None for any.
        low: the smallest value; None for any, and for values that are not finite.
    """

    kind: Kind = "float"
    ndim: int | None = None
    low: float | None = None

    @override
    def check(self, value: Tensor, context: Context, path: str) -> None:
        if not _DTYPES[self.kind](value.dtype) or self.ndim not in (None, value.ndim):
            dimensions = "" if self.ndim is None else f" with {self.ndim} dimensions"
            raise damage(path, f"a {self.kind} tensor{dimensions}", _shown(value))
        if self.low is not None and not bool((value.isfinite() & (value >= self.low)).all()):
            raise damage(path, f"finite values >= {self.low:g}", "others")


@dataclass(frozen=True)
class LikeTensors(Rule):
    """Tensors by the names of tensors of the network, in their shapes."""

    kind: Kind = "float"

    @override
    def check(self, value: Mapping[str, Tensor], context: Context, path: str) -> None:
        for name, tensor in value.items():
            place = f"{path}[{name!r}]"
            TensorOf(self.kind).check(tensor, context, place)
            if context.shapes is None:
                continue
            if name not in context.shapes:
                raise damage(path, "names of tensors of the network", repr(name))
            if tensor.shape != context.shapes[name]:
                raise damage(place, f"the shape of `{name}`, {tuple(context.shapes[name])}", _shown(tensor))


@dataclass(frozen=True)
class LayerName(Rule):
    """The name of a module of the network."""

    @override
    def check(self, value: str, context: Context, path: str) -> None:
        if context.shapes is not None and value not in context.layers:
            raise damage(path, "the name of a module of the network", repr(value))


class Needs(Rule):
    """A value that is of use only beside others: their keys."""

    def __init__(self, *keys: str) -> None:
        self.keys = keys

    @override
    def check(self, value: Any, context: Context, path: str) -> None:
        for key in self.keys:
            if key not in context.holder:
                raise damage(path, f"the key {key!r} beside it", "none")


@dataclass(frozen=True)
class Within(Rule):
    """A dict whose keys are among those of the one under ``key``."""

    key: str

    @override
    def check(self, value: Mapping[str, Any], context: Context, path: str) -> None:
        for name in value:
            if name not in context.holder.get(self.key, ()):
                raise damage(path, f"keys that {self.key!r} has", repr(name))


@dataclass(frozen=True)
class Length(Rule):
    """A list of so many items, or of as many as there are in the list under a key."""

    wanted: int | str

    @override
    def check(self, value: list[Any], context: Context, path: str) -> None:
        wanted = self.wanted if isinstance(self.wanted, int) else len(context.holder.get(self.wanted, ()))
        if len(value) != wanted:
            raise damage(path, f"{wanted} items", str(len(value)))


@dataclass(frozen=True)
class FieldsOf(Rule):
    """A list of the values of a dataclass, in the order of its fields."""

    kind: type[Any]

    @override
    def check(self, value: list[Any], context: Context, path: str) -> None:
        hints = hints_of(self.kind)  # type: ignore[arg-type]  # a class is hashable
        Length(len(hints)).check(value, context, path)
        for item, (name, hint) in zip(value, hints.items(), strict=True):
            check_schema(item, hint, f"{path}, {name}", context)


class PlainExample(TypedDict, total=False):
    """One call of a network, as `store_example` keeps it; empty where it has other objects than tensors."""

    args: Annotated[tuple[Any, ...], Needs("kwargs")]
    kwargs: Annotated[dict[str, Any], Needs("args")]
    method: str


def damage(path: str, expected: str, found: str) -> ManifestError:
    """Return the error for a part that is not sound: what was expected there, and what was found."""
    return ManifestError(
        f"The checkpoint's manifest is damaged at `{path}`: expected {expected}, found {found}. Use another checkpoint "
        "of the run."
    )


@functools.cache
def hints_of(kind: Any) -> dict[str, Any]:
    """Return the annotations of a `TypedDict`, a named tuple or a dataclass, with what they ask beside types."""
    return get_type_hints(kind, include_extras=True)


def check_schema(value: Any, annotation: Any, path: str, context: Context = Context()) -> None:  # frozen
    """Check that ``value`` conforms to ``annotation``.

    Args:
        value: plain containers, numbers, strings and tensors.
        annotation: a type, ``X | None``, ``Literal``, ``list[X]``, ``tuple[X, ...]``, ``dict[K, V]`` or a `TypedDict`,
            nested as needed. ``float`` admits an int; ``Any`` everything. One that is ``Annotated`` with a range of
            `lightning_light.validation`, or with a `Rule`, requires more than a type.
        path: of the value, for the message.
        context: what rules compare with.

    Raises:
        ManifestError: names the part that does not fit, what was expected and what was found.

    Example:
        >>> check_schema({"step": 3, "masks": {}}, dict[str, int], "state['pruning']")
        Traceback (most recent call last):
            ...
        lightning_light.errors.ManifestError: The checkpoint's manifest is damaged at `state['pruning']['masks']`: ...
    """
    if annotation is not Any and not _is_sound(value, annotation, path, context):
        raise damage(path, _name(annotation), _shown(value))


def _is_sound(value: Any, annotation: Any, path: str, context: Context) -> bool:
    """Check one level; what lies inside is checked by `check_schema`, which raises."""
    if is_typeddict(annotation):
        return isinstance(value, dict) and _check_keys(value, annotation, path, context)
    origin = get_origin(annotation)
    if origin is Annotated:
        return _check_annotated(value, annotation, path, context)
    if origin in (Union, UnionType):
        return _check_union(value, get_args(annotation), path, context)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in get_args(annotation))
    if origin is not None:
        items = _items(value, origin, get_args(annotation), path)
        for item, kind, place in items or ():
            check_schema(item, kind, place, context)
        return items is not None
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, NoneType if annotation is None else annotation)


def _check_annotated(value: Any, annotation: Any, path: str, context: Context) -> bool:
    base, *marks = get_args(annotation)
    check_schema(value, base, path, context)
    for mark in marks:
        if isinstance(mark, Rule):
            mark.check(value, context, path)
        elif isinstance(mark, Constraint) and not mark.admits(value):
            raise damage(path, mark.expected(_name(base), "value"), _shown(value))
    return True


def _check_union(value: Any, options: tuple[Any, ...], path: str, context: Context) -> bool:
    """With one option besides None, what lies inside is named in the message."""
    if value is None:
        return NoneType in options
    others = [option for option in options if option is not NoneType]
    if len(others) > 1:
        return any(_admits(value, option, path, context) for option in others)
    check_schema(value, others[0], path, context)
    return True


def _admits(value: Any, option: Any, path: str, context: Context) -> bool:
    try:
        check_schema(value, option, path, context)
    except ManifestError:
        return False
    return True


def _check_keys(value: dict[str, Any], annotation: Any, path: str, context: Context) -> bool:
    hints = hints_of(annotation)
    for key in sorted(annotation.__required_keys__ - value.keys()):
        raise damage(path, f"the key {key!r}", "none")
    for key in sorted(map(str, value.keys() - hints.keys())):
        raise damage(path, f"keys among {sorted(hints)}", repr(key))
    inside = Context(context.shapes, context.layers, value)
    for key, item in value.items():
        check_schema(item, hints[key], f"{path}[{key!r}]", inside)
    return True


def _items(value: Any, origin: Any, arguments: tuple[Any, ...], path: str) -> list[tuple[Any, Any, str]] | None:
    """What lies in a container, each with its annotation and path; None where it is not such a container."""
    if not isinstance(value, origin):
        return None
    if origin is dict:
        keys, items = arguments
        return [
            one
            for key, item in value.items()
            for one in ((key, keys, f"{path}, key {key!r}"), (item, items, f"{path}[{key!r}]"))
        ]
    same = origin is list or arguments[1:] == (...,)
    kinds = [arguments[0]] * len(value) if same else list(arguments)
    places = [f"{path}[{place}]" for place in range(len(value))]
    return list(zip(value, kinds, places, strict=True)) if len(kinds) == len(value) else None


def _name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return type(value).__name__ if isinstance(value, (dict, list, tuple)) else f"{value!r}"[:60]
