"""Every public constructor and function refuses a wrong argument in one sentence, before anything is changed."""

import collections.abc
import enum
import functools
import importlib
import inspect
import math
import pickle
import pkgutil
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import pytest
import torch
from torch import nn

import lightning_light as ll
from lightning_light.validation import Constraint, annotations_of
from tests.zoo import ZOO

_NUMBERS: tuple[float, ...] = (-1, -1.0, 0, 1e9, 10**9, math.nan, math.inf, True)


class _Unknown:
    """Belongs nowhere."""


class Argument(NamedTuple):
    """An argument of a public class or function."""

    owner: Any
    name: str
    annotation: Any

    def __str__(self) -> str:
        return f"{self.owner.__name__}.{self.name}"


# What is public, and what it expects.


def public() -> list[Any]:
    """The functions and classes that a user calls.

    Not exceptions, which are raised for a user, nor records, which are made for one: they document their attributes and
    no arguments.
    """
    packages = {module.name for module in pkgutil.iter_modules(ll.__path__) if module.ispkg}
    modules = [importlib.import_module(f"{ll.__name__}.{one}") for one in sorted(packages | {*ll._MODULES.values()})]
    found = [getattr(module, name) for module in (ll, *modules) for name in getattr(module, "__all__", ())]
    values = {id(value): value for value in found}
    return [value for value in values.values() if inspect.isfunction(value) or _is_constructor(value)]


def _is_constructor(value: Any) -> bool:
    if not isinstance(value, type) or issubclass(value, BaseException) or inspect.isabstract(value):
        return False
    text = inspect.getdoc(value) or ""
    return "Attributes:" not in text or "Args:" in text


def arguments() -> list[Argument]:
    return [
        Argument(owner, name, annotations_of(owner)[name])
        for owner in public()
        for name, parameter in inspect.signature(owner).parameters.items()
        if parameter.annotation is not parameter.empty
    ]


def alternatives(annotation: Any) -> list[Any]:
    """The members of a union, without constraints."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (typing.Union, types.UnionType):
        return [inner for one in get_args(annotation) for inner in alternatives(one)]
    if hasattr(annotation, "__supertype__"):
        return alternatives(annotation.__supertype__)
    return [annotation]


def constraints(annotation: Any) -> list[Constraint]:
    marks = [mark for mark in getattr(annotation, "__metadata__", ()) if isinstance(mark, Constraint)]
    inner = get_args(annotation) if get_origin(annotation) in (typing.Union, types.UnionType, Annotated) else ()
    return marks + [mark for one in inner for mark in constraints(one)]


def is_open(annotation: Any) -> bool:
    """Whether the annotation says nothing of a value."""
    return any(
        one in (Any, object) or isinstance(one, TypeVar) or getattr(one, "_is_protocol", False)
        for one in alternatives(annotation)
    )


# Values that fit and values that do not, by annotation.


def fitting(annotation: Any) -> Any:
    """A value that an argument takes, for the arguments beside a wrong one."""
    one = alternatives(annotation)[0]
    origin, inner = get_origin(one), get_args(one)
    if origin is Literal:
        return inner[0]
    if origin is type or is_open(one) or one is type(None):
        return nn.Linear if origin is type else None
    if one in (int, float):
        return next(value for value in (1, 2, 20) if all(mark.admits(value) for mark in constraints(annotation)))
    known: dict[Any, Any] = {
        str: "text",
        bool: False,
        nn.Module: ZOO["plain"](),
        torch.Tensor: torch.ones(2),
        collections.abc.Callable: abs,
        collections.abc.Iterable: [],
        collections.abc.Sequence: [],
        collections.abc.Collection: [],
        collections.abc.Mapping: {},
        dict: {},
        frozenset: frozenset(),
    }
    kind = origin or one
    return known[kind] if kind in known else instance_of(kind)


@functools.cache
def instance_of(kind: type[Any]) -> Any:
    """An instance of ``kind``, or of the subclass that needs the fewest arguments."""
    derived = min(_family(kind), key=lambda one: len(needed(one)))
    hints = annotations_of(derived) if needed(derived) else {}
    return derived(**{name: fitting(hints[name]) for name in needed(derived)})


def needed(owner: Any) -> list[str]:
    """The arguments without a default."""
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(owner).parameters.values()
    return [one.name for one in parameters if one.default is one.empty and one.kind not in variadic]


def _family(kind: type[Any]) -> Iterator[type[Any]]:
    if not inspect.isabstract(kind) and not kind.__name__.startswith("_"):
        yield kind
    for derived in kind.__subclasses__():
        if derived.__module__.startswith((ll.__name__, kind.__module__)):
            yield from _family(derived)


def wrong(annotation: Any) -> Iterator[Any]:
    """Values that the annotation excludes; none where it says nothing of a value."""
    if is_open(annotation):
        return
    ones = alternatives(annotation)
    kinds = [get_origin(one) or one for one in ones]
    yield _Unknown()
    if str not in kinds and Path not in kinds:
        yield "nonsense"
    if {int, float, bool}.isdisjoint(kinds):
        yield 7
    else:
        yield from _wrong_numbers(annotation, kinds)
    if type not in kinds and collections.abc.Callable not in kinds:
        yield from (type(instance_of(kind)) for kind in kinds if _is_ours(kind))
    yield from _wrong_items(annotation, ones)


def _wrong_numbers(annotation: Any, kinds: list[Any]) -> Iterator[Any]:
    marks = constraints(annotation)
    for value in _NUMBERS:
        right = (type(value) in kinds) or (type(value) is int and float in kinds)
        if not right or not all(mark.admits(value) for mark in marks):
            yield value


def _wrong_items(annotation: Any, ones: list[Any]) -> Iterator[Any]:
    for one in ones:
        origin, inner = get_origin(one), get_args(one)
        if origin in (list, collections.abc.Sequence) or (origin is tuple and Ellipsis in inner):
            as_container = tuple if origin is tuple else list
            yield from (as_container([item]) for item in wrong(inner[0]))
        if origin in (dict, collections.abc.Mapping):
            yield from ({"conv": item} for item in wrong(inner[1]))


def _is_ours(kind: Any) -> bool:
    return (
        isinstance(kind, type)
        and kind.__module__.startswith(ll.__name__)
        and not issubclass(kind, enum.Enum)
        and _is_buildable(kind)
    )


def _is_buildable(kind: type[Any]) -> bool:
    return any(_is_constructor(derived) for derived in _family(kind))


def call(owner: Any, name: str, value: Any) -> Any:
    """Call ``owner`` with ``name=value``, and what else it needs."""
    hints = annotations_of(owner)
    return owner(**{other: fitting(hints[other]) for other in needed(owner)} | {name: value})


ARGUMENTS = [one for one in arguments() if not is_open(one.annotation)]


@pytest.mark.parametrize("argument", ARGUMENTS, ids=str)
def test_wrong_argument_is_one_sentence(argument: Argument) -> None:
    values = list(wrong(argument.annotation))
    assert values
    for value in values:
        with pytest.raises((TypeError, ValueError)) as caught:
            call(argument.owner, argument.name, value)
        sentence = str(caught.value)
        assert sentence.startswith(f"`{argument.owner.__name__}({argument.name}="), value
        assert "expected" in sentence
        assert "found" in sentence


NET = ZOO["plain"]()
X = NET.example[0]

NAMED: dict[str, tuple[Any, str]] = {
    "criterion": (
        lambda: ll.StructuredPruning(ll.MACs(0.5), criterion="l1"),  # type: ignore[arg-type]
        r"`StructuredPruning\(criterion='l1'\)`: expected a Criterion, found str 'l1'. For instance `criterion=Magn",
    ),
    "criterion class": (
        lambda: ll.StructuredPruning(ll.MACs(0.5), criterion=ll.Magnitude),  # type: ignore[arg-type]
        r"expected a Criterion, found the class Magnitude. Pass an instance: `Magnitude\(\)`",
    ),
    "schedule": (
        lambda: ll.WeightPruning(ll.Sparsity(0.5), schedule="cubic"),  # type: ignore[arg-type]
        r"`WeightPruning\(schedule='cubic'\)`: expected a Schedule, found str 'cubic'. Write `schedule=Cubic\(\)`",
    ),
    "ranking": (
        lambda: ll.prune_channels(NET, X, ll.MACs(0.5), ranking="global"),  # type: ignore[arg-type]
        r"`prune_channels\(ranking='global'\)`: expected a Ranking, found str 'global'. Write `ranking=Global\(\)`",
    ),
    "losses": (
        lambda: ll.KnowledgeDistillation(NET, losses=ll.SoftTargets),  # type: ignore[arg-type]
        r"`KnowledgeDistillation\(losses=SoftTargets\)`: expected .*found the class SoftTargets. Pass an instance",
    ),
    "ranks": (
        lambda: ll.LowRankFactorization(ll.MACs(0.5), ranks=8),  # type: ignore[call-arg]
        r"`LowRankFactorization\(...\)`: got an unexpected keyword argument 'ranks'. Its arguments: budget, schedule",
    ),
    "no budget": (lambda: ll.prune_channels(NET, X), r"`prune_channels\(\)`: expected a budget or .*, found neither"),
    "recipe class": (
        lambda: ll.QuantizationAwareTraining(ll.Int8),  # type: ignore[arg-type]
        r"`QuantizationAwareTraining\(recipe=Int8\)`: expected a Recipe, found the class Int8. Pass .*`Int8\(\)`",
    ),
    "percentage": (
        lambda: ll.MACs(40),
        r"`MACs\(remaining=40\)`: expected 0 < remaining <= 1, found 40. .* not a percentage: write `remaining=0.4`",
    ),
    "recipe name": (
        lambda: ll.quantize(NET, X, recipe="int8"),  # type: ignore[arg-type]
        r"`quantize\(recipe='int8'\)`: expected a Recipe, found str 'int8'. Write `recipe=Int8\(\)`",
    ),
}


@pytest.mark.parametrize("case", NAMED)
def test_common_mistakes(case: str) -> None:
    mistake, sentence = NAMED[case]
    with pytest.raises((TypeError, ValueError), match=sentence):
        mistake()


def test_one_loss_needs_no_list() -> None:
    assert ll.KnowledgeDistillation(NET, losses=ll.SoftTargets()).losses == ll.SoftTargets()


def test_refused_call_leaves_the_model_as_it_was() -> None:
    net = ZOO["plain"]().train()
    before = pickle.dumps(net)
    functions = [one.owner for one in ARGUMENTS if inspect.isfunction(one.owner) and one.annotation is nn.Module]
    assert ll.prune_channels in functions
    for function in functions:
        given = {name: fitting(annotations_of(function)[name]) for name in needed(function)}
        name = next(one.name for one in reversed(ARGUMENTS) if one.owner is function)
        given |= {"model": net, name: _Unknown()}
        with pytest.raises(TypeError):
            function(**given)
        assert pickle.dumps(net) == before
