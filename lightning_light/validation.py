"""Check the arguments of a constructor or a function against its annotations.

The annotations contain what is expected, ranges included (`Fraction`, `PositiveInt`, ...); `validated` reads them once
and checks every call. A relation between two arguments, which no annotation expresses, is checked by the class itself.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import nn
from typing_extensions import override

__all__ = [
    "Constraint",
    "Fraction",
    "FractionBelowOne",
    "Moment",
    "MomentRange",
    "NonNegativeFloat",
    "NonNegativeInt",
    "OpenFraction",
    "PositiveFloat",
    "PositiveInt",
    "Range",
    "annotations_of",
    "check_argument",
    "validated",
]

T = TypeVar("T", bound=Callable[..., Any])


class Constraint(ABC):
    """A condition on a value beside its type: ``Annotated[float, Range(0.0, 1.0)]``."""

    @abstractmethod
    def admits(self, value: Any) -> bool:
        """Whether ``value``, which has the right type, is within the constraint."""

    @abstractmethod
    def expected(self, kind: str, name: str) -> str:
        """What is expected of the argument ``name`` of type ``kind``, for an error message."""

    @abstractmethod
    def hint(self, name: str, value: Any) -> str:
        """How to correct ``value``; empty where there is nothing to add."""


@dataclasses.dataclass(frozen=True)
class Range(Constraint):
    """A finite number between ``low`` and ``high``; ``above`` excludes ``low`` itself, ``below`` excludes ``high``."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    @override
    def admits(self, value: Any) -> bool:
        return bool(
            abs(value) < math.inf
            and (self.low < value if self.above else self.low <= value)
            and (value < self.high if self.below else value <= self.high)
        )

    @override
    def expected(self, kind: str, name: str) -> str:
        if math.isinf(self.high):
            return f"{kind} {'>' if self.above else '>='} {self.low:g}"
        return f"{self.low:g} {'<' if self.above else '<='} {name} {'<' if self.below else '<='} {self.high:g}"

    @override
    def hint(self, name: str, value: Any) -> str:
        if self.high == 1.0 and 1.0 < value <= 100.0:
            return f"It is a fraction, not a percentage: write `{_assigned(name, f'{value / 100:g}')}`."
        return ""


@dataclasses.dataclass(frozen=True)
class MomentRange(Constraint):
    """An epoch (int >= 0) or a fraction of the run (float in [0, 1])."""

    @override
    def admits(self, value: Any) -> bool:
        return value >= 0 if isinstance(value, int) else 0.0 <= value <= 1.0

    @override
    def expected(self, kind: str, name: str) -> str:
        return "an epoch (int >= 0) or a fraction of the run (float in [0, 1])"

    @override
    def hint(self, name: str, value: Any) -> str:
        return f"For epoch 5 write `{_assigned(name, '5')}`, for the middle of the run `{_assigned(name, '0.5')}`."


PositiveInt: TypeAlias = Annotated[int, Range(1)]
NonNegativeInt: TypeAlias = Annotated[int, Range(0)]
PositiveFloat: TypeAlias = Annotated[float, Range(0.0, above=True)]
NonNegativeFloat: TypeAlias = Annotated[float, Range(0.0)]
Fraction: TypeAlias = Annotated[float, Range(0.0, 1.0)]
OpenFraction: TypeAlias = Annotated[float, Range(0.0, 1.0, above=True)]
FractionBelowOne: TypeAlias = Annotated[float, Range(0.0, 1.0, below=True)]
Moment: TypeAlias = Annotated[int | float, MomentRange()]
"""A point of a run, an epoch counted from 0 (int) or a fraction of the run (float)."""


def validated(target: T) -> T:
    """Check the arguments of every call of a class or function against its annotations.

    Types, ``Literal`` choices and the ranges of this module are checked, inside of containers too. ``bool`` is no
    number here. A ``numpy.float64`` is a float of Python and passes; other numpy and torch scalars are refused, because
    neither YAML nor a checkpoint that is loaded with ``weights_only=True`` can hold them.

    On a class it checks ``__init__``; above ``@dataclass``, so that there is one. A subclass with its own ``__init__``
    is checked by its own annotations, if it is decorated, and here only for what it passes on.

    Raises:
        TypeError: a call with an argument of the wrong type, a class where an instance belongs, a missing or an unknown
            argument.
        ValueError: a call with a value out of range.

    Example:
        >>> @validated
        ... def prune(model: nn.Module, *, remaining: OpenFraction = 0.5) -> None: ...
        >>> prune(nn.Identity(), remaining=40)
        Traceback (most recent call last):
            ...
        ValueError: `prune(remaining=40)`: expected 0 < remaining <= 1, found 40. ...
    """
    if not isinstance(target, type):
        return typing.cast("T", _checked(target, target, target.__name__))
    if "__init__" not in vars(target):
        raise TypeError(
            f"`@validated` on `{target.__name__}`: expected a class with its own `__init__`, found none. Put it above "
            "`@dataclass`."
        )
    setattr(target, "__init__", _checked(vars(target)["__init__"], target, target.__name__))  # noqa: B010  # mypy
    return target


def _checked(function: Callable[..., Any], owner: Any, name: str) -> Callable[..., Any]:
    """``function``, which checks its arguments first; ``owner`` is the class or function that a user calls."""
    signature = inspect.signature(function)
    annotations = functools.cache(lambda: annotations_of(owner))  # at the first call: names may be defined later

    def check(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inherited = isinstance(owner, type) and args and inspect.getattr_static(type(args[0]), "__init__") is checked
        call = type(args[0]).__name__ if inherited else name
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(_wrong_arguments(call, signature, kwargs, str(error))) from None
        expected = annotations()
        for parameter, value in _given(signature, bound):
            if parameter.name in expected:
                default = None if parameter.default is parameter.empty else parameter.default
                check_argument(call, parameter.name, value, expected[parameter.name], default)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        check(args, kwargs)
        return function(*args, **kwargs)

    # With the globals of `function`: jsonargparse resolves annotations in the globals of what it finds, not in those of
    # `__wrapped__`, and a name of this module must not take the place of the user's.
    checked = types.FunctionType(wrapper.__code__, function.__globals__, name, None, wrapper.__closure__)
    return functools.update_wrapper(checked, function)


def annotations_of(target: Any) -> dict[str, Any]:
    """Resolve the annotations of a function, or of the constructor of a class.

    Raises:
        TypeError: an annotation names something that is not imported at run time.
    """
    generated = "__dataclass_params__" in vars(target) and target.__dataclass_params__.init
    source = inspect.getattr_static(target, "__init__") if isinstance(target, type) and not generated else target
    try:
        return get_type_hints(source, localns={"KW_ONLY": object}, include_extras=True)  # 3.10 expects types alone
    except NameError as error:
        raise TypeError(
            f"`@validated` on `{target.__qualname__}`: expected annotations that can be resolved at run time, found "
            f"`{error.name}`, which is not. Import it outside of `if TYPE_CHECKING:`."
        ) from error


def check_argument(call: str, name: str, value: object, annotation: Any, default: object = None) -> None:
    """Check one argument of ``call``.

    Args:
        call: the class or function, as the user calls it.
        name: of the argument.
        value: what was given.
        annotation: a type, a union, a container, a ``Literal``, or one of them ``Annotated`` with a range.
        default: of the argument; shown as an example of what is right.

    Raises:
        TypeError: ``value`` has the wrong type.
        ValueError: ``value`` has the right type and is out of range.
    """
    if _conforms(value, annotation):
        return
    right_type = _conforms(value, annotation, constraints=False)
    wrong, expected = _innermost(value, annotation)
    place, example = (name, default) if wrong is value else ("", None)
    found = _shown(wrong) if right_type else _found(wrong)
    sentences = [
        f"`{call}({name}={_shown(value)})`: expected {_expected(annotation, name)}, found {found}.",
        _range_hint(expected, place, wrong) if right_type else _type_hint(expected, place, wrong, example),
    ]
    raise (ValueError if right_type else TypeError)(" ".join(filter(None, sentences)))


def _given(signature: inspect.Signature, bound: inspect.BoundArguments) -> Iterator[tuple[inspect.Parameter, Any]]:
    """Every value of a call with its parameter; those of ``*args`` and ``**kwargs`` one by one."""
    for name, value in bound.arguments.items():
        parameter = signature.parameters[name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            yield from ((parameter, item) for item in value)
        elif parameter.kind is parameter.VAR_KEYWORD:
            yield from ((parameter, item) for item in value.values())
        else:
            yield parameter, value


# Whether a value fits an annotation.


def _conforms(value: Any, annotation: Any, *, constraints: bool = True) -> bool:
    """Whether ``value`` fits ``annotation``; without ``constraints`` by its type alone."""
    origin = get_origin(annotation)
    if origin is Annotated:
        base, *marks = get_args(annotation)
        if not _conforms(value, base, constraints=constraints):
            return False
        return not constraints or all(mark.admits(value) for mark in marks if isinstance(mark, Constraint))
    if origin in (typing.Union, types.UnionType):
        return any(_conforms(value, one, constraints=constraints) for one in get_args(annotation))
    if origin is Literal:
        choices = get_args(annotation)
        return any(type(value) is type(one) and (not constraints or value == one) for one in choices)
    if origin is type:
        return isinstance(value, type) and _is_subclass(value, get_args(annotation)[0])
    if origin is None:
        return _is_instance(value, annotation)
    return _is_instance(value, origin) and _items_conform(value, origin, get_args(annotation), constraints)


def _innermost(value: Any, annotation: Any) -> tuple[Any, Any]:
    """What is wrong, with what was expected there: the item of a container, or ``value`` itself."""
    for one in _alternatives(annotation):
        origin, arguments = get_origin(one), get_args(one)
        if not isinstance(origin, type) or not arguments or isinstance(value, str) or not _is_instance(value, origin):
            continue
        items = list(value.values()) if isinstance(value, collections.abc.Mapping) else value
        if isinstance(items, list | tuple):
            return next(
                (_innermost(item, arguments[-1]) for item in items if not _conforms(item, arguments[-1])),
                (value, annotation),
            )
    return value, annotation


def _is_instance(value: Any, kind: Any) -> bool:
    """`isinstance`, where a bool is no number, an int is a float too, and what is not a class is not checked."""
    if kind is Any or kind is None:
        return kind is Any or value is None
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hasattr(kind, "__supertype__"):  # of `typing.NewType`
        return _conforms(value, kind.__supertype__)
    unchecked = getattr(kind, "_is_protocol", False) and not getattr(kind, "_is_runtime_protocol", False)
    return not _is_class(kind) or unchecked or isinstance(value, kind)


def _is_subclass(value: type, kind: Any) -> bool:
    return not _is_class(kind) or issubclass(value, kind)


def _is_class(annotation: Any) -> bool:
    """Whether an annotation is a class; on Python 3.10 ``list[int]`` is an instance of ``type`` too."""
    return isinstance(annotation, type) and get_origin(annotation) is None


def _items_conform(value: Any, origin: Any, arguments: tuple[Any, ...], constraints: bool) -> bool:
    """Whether what is in a container fits; an iterator is not consumed, and a string is no sequence of strings."""
    if isinstance(value, str | bytes):
        return not issubclass(origin, collections.abc.Iterable)
    fits = functools.partial(_conforms, constraints=constraints)
    if isinstance(value, collections.abc.Mapping) and len(arguments) == 2:
        return all(fits(key, arguments[0]) and fits(item, arguments[1]) for key, item in value.items())
    if origin is tuple and Ellipsis not in arguments:
        return len(value) == len(arguments) and all(map(fits, value, arguments))
    if isinstance(value, list | tuple | set | frozenset) and arguments:
        return all(fits(item, arguments[0]) for item in value)
    return True


# The message about a value that does not fit.

_KINDS = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "True or False",
    type(None): "None",
    collections.abc.Callable: "a callable",
}


def _expected(annotation: Any, name: str) -> str:
    """What an annotation expects, in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        base, *marks = arguments
        kind = _expected(base, name)
        return next((mark.expected(kind, name) for mark in marks if isinstance(mark, Constraint)), kind)
    if origin in (typing.Union, types.UnionType):
        *first, last = dict.fromkeys(_expected(one, name) for one in arguments)
        return f"{', '.join(first)} or {last}" if first else last
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin is type:
        return f"a class derived from {_name(arguments[0])}"
    if annotation in _KINDS or origin in _KINDS:
        return _KINDS.get(annotation) or _KINDS[origin]
    if origin is None:
        return _with_article(_name(annotation))
    joint = " to " if isinstance(origin, type) and issubclass(origin, collections.abc.Mapping) else ", "
    items = [_expected(one, "value").removeprefix("an ").removeprefix("a ") for one in arguments if one is not Ellipsis]
    return f"{_with_article(_name(origin).lower())} of {joint.join(items)}"


def _assigned(name: str, value: str) -> str:
    """``name=value``; the value alone where it is an item of a container."""
    return f"{name}={value}" if name else value


def _name(annotation: Any) -> str:
    return getattr(annotation, "__name__", str(annotation))


def _with_article(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeio' else 'a'} {noun}"


def _shown(value: object) -> str:
    """A value as one writes it, on one line; large objects by their type."""
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, nn.Module | torch.Tensor):
        return f"{type(value).__name__}(...)"
    text = " ".join(repr(value).split())
    return text if len(text) <= 120 else f"{text[:117]}..."


def _found(value: object) -> str:
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    plain = isinstance(value, str | int | float)
    return f"{type(value).__name__} {_shown(value)}" if plain else f"{type(value).__name__}"


def _range_hint(annotation: Any, name: str, value: Any) -> str:
    """How to correct a value out of range: the hint of the first constraint that its type falls under."""
    marks = [mark for one in _alternatives(annotation) for mark in getattr(one, "__metadata__", ())]
    if isinstance(value, int | float):
        return next((hint for mark in marks if isinstance(mark, Constraint) and (hint := mark.hint(name, value))), "")
    choices = [choice for one in _alternatives(annotation) if get_origin(one) is Literal for choice in get_args(one)]
    near = difflib.get_close_matches(str(value), [choice for choice in choices if isinstance(choice, str)], n=1)
    return f"Write `{_assigned(name, repr(near[0]))}`." if near else ""


def _type_hint(annotation: Any, name: str, value: object, default: object) -> str:
    """How to correct a value of the wrong type."""
    classes = [one for one in _alternatives(annotation) if isinstance(one, type) and one not in _KINDS]
    if isinstance(value, type) and _conforms_as_instance(value, annotation):
        return f"Pass an instance: `{_written(value)}`."
    if isinstance(value, numbers.Number | torch.Tensor) and hasattr(value, "item"):
        return f"Convert it to a number of Python: `{_assigned(name, 'value.item()')}`."
    origins: list[Any] = [get_origin(one) for one in _alternatives(annotation)]
    if hasattr(value, "train_dataloader") and collections.abc.Iterable in origins:
        return f"Give a loader of the data module: `{_assigned(name, 'data_module.train_dataloader()')}`."
    for one in _alternatives(annotation):
        if get_origin(one) in (list, collections.abc.Sequence) and _conforms([value], one):
            return f"Write a list: `{_assigned(name, f'[{_shown(value)}]')}`."
    if isinstance(value, str) and (near := _nearest(classes, value)):
        return f"Write `{_assigned(name, _written(near))}`."
    if default is not None:
        return f"For instance `{_assigned(name, _shown(default))}`."
    example = next((kind for one in classes for kind in _concrete(one)), None)
    return f"For instance `{_assigned(name, _written(example))}`." if example else ""


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union, or the annotation alone."""
    if get_origin(annotation) in (typing.Union, types.UnionType):
        return [inner for one in get_args(annotation) for inner in _alternatives(one)]
    return [annotation]


def _conforms_as_instance(value: type, annotation: Any) -> bool:
    """Whether an instance of the class ``value`` would fit."""
    kinds = [one for one in _alternatives(annotation) if _is_class(one)]
    return any(issubclass(value, kind) for kind in kinds)


def _concrete(kind: type) -> Iterator[type]:
    """The public classes of this package, or of a user's, that derive from ``kind`` and can be instantiated."""
    if kind.__module__.partition(".")[0] in ("builtins", "collections", "torch", "typing"):
        return
    if not inspect.isabstract(kind) and not kind.__name__.startswith("_"):
        yield kind
    derived: type
    for derived in kind.__subclasses__():
        yield from _concrete(derived)


def _nearest(classes: list[type], text: str) -> type | None:
    """The class that ``text`` resembles: ``"cubic"``, ``"fine_grained"``, ``"Cubic()"``."""
    known = {kind.__name__.lower(): kind for one in classes for kind in _concrete(one)}
    plain = "".join(letter for letter in text.lower() if letter.isalnum())
    near = difflib.get_close_matches(plain, known, n=1, cutoff=0.6)
    return known[near[0]] if near else None


def _written(kind: type) -> str:
    """The shortest call that makes an instance of ``kind``."""
    parameters = inspect.signature(kind).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]
    return f"{kind.__name__}({', '.join(f'{name}=...' for name in needed)})"


def _wrong_arguments(call: str, signature: inspect.Signature, given: dict[str, Any], error: str) -> str:
    """Missing, surplus or unknown arguments, with the names that there are."""
    known = [name for name in signature.parameters if name != "self"]
    unknown = [name for name in given if name not in known]
    near = [match for name in unknown for match in difflib.get_close_matches(name, known, n=1)]
    mend = f"Write `{near[0]}=...`." if near else f"Its arguments: {', '.join(known) or 'none'}."
    return f"`{call}(...)`: {error}. {mend}"
