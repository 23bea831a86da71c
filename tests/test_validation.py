"""Arguments are checked against their annotations, at construction, with one kind of sentence."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import pickle
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from torch import nn

import lightning_light
from lightning_light.criteria import Criterion, Magnitude, Taylor
from lightning_light.schedules import Cubic, Schedule, Window
from lightning_light.validation import (
    Fraction,
    Moment,
    NonNegativeFloat,
    NonNegativeInt,
    OpenFraction,
    PositiveFloat,
    PositiveInt,
    annotations_of,
    validated,
)

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


class Range(ABC):
    """Has the name of a class of `validation` itself, which must not be taken for it."""

    @abstractmethod
    def __call__(self) -> int: ...


@validated
@dataclass(frozen=True)
class Energy(Range):
    kept: OpenFraction = 0.9
    needed: int = field(default=3, kw_only=True)

    def __call__(self) -> int:
        return 1


@validated
class Method(Callback):
    """Takes its arguments as a callback of the package does."""

    def __init__(
        self,
        rule: Range | None = None,
        *,
        criterion: Criterion = Magnitude(),
        schedule: Schedule = Window(Cubic(), start=0.1, end=0.6),
        every_n_steps: PositiveInt | None = None,
        heads: Literal["dim", "head"] = "dim",
        losses: Sequence[Criterion] | None = None,
        remaining: Mapping[str, OpenFraction] | None = None,
        widths: tuple[PositiveInt, PositiveInt] = (1, 1),
        start: Moment = 0.1,
        scale: PositiveFloat = 1.0,
        penalty: NonNegativeFloat = 0.0,
        warmup: NonNegativeInt = 0,
        amount: Fraction = 0.5,
        predicate: Callable[[str], bool] | None = None,
        teacher: nn.Module | None = None,
        module: type[nn.Module] | None = None,
        path: str | Path = "",
        dry_run: bool = False,
    ) -> None:
        given = {name: value for name, value in locals().items() if name != "self" and not name.startswith("__")}
        vars(self).update(given)


GOOD: list[dict[str, Any]] = [
    {"rule": Energy(1.0), "criterion": Taylor(), "schedule": Cubic()},
    {"every_n_steps": 1, "heads": "head", "losses": [Taylor()], "remaining": {"a": 1, "b": 0.1}},
    {"losses": (), "remaining": {}, "widths": (2, 3), "start": 3},
    {"start": 1.0, "scale": 2, "penalty": 0.0, "warmup": 0, "amount": 1},
    {"predicate": str.isalpha, "teacher": nn.Identity(), "module": nn.Linear, "path": Path("a"), "dry_run": True},
    {"scale": np.float64(0.5), "warmup": 10**400},
]


@pytest.mark.parametrize("arguments", GOOD, ids=str)
def test_what_fits_is_passed_on_unchanged(arguments: dict[str, Any]) -> None:
    method = Method(**arguments)
    assert all(getattr(method, name) is value for name, value in arguments.items())


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"criterion": "l1"}, TypeError, r"expected a Criterion, found str 'l1'. For instance `criterion=Magnitude\(p=2.0"),
    ({"criterion": "taylor"}, TypeError, r"Write `criterion=Taylor\(\)`"),
    ({"criterion": "magnitude()"}, TypeError, r"Write `criterion=Magnitude\(\)`"),
    ({"criterion": Taylor}, TypeError, r"found the class Taylor. Pass an instance: `Taylor\(\)`"),
    ({"criterion": Cubic()}, TypeError, r"expected a Criterion, found Cubic"),
    ({"criterion": None}, TypeError, r"expected a Criterion, found None"),
    ({"schedule": "cubic"}, TypeError, r"Write `schedule=Cubic\(\)`"),
    ({"rule": 8}, TypeError, r"expected a Range or None, found int 8. For instance `rule=Energy\(\)`"),
    ({"rule": Energy}, TypeError, r"Pass an instance: `Energy\(\)`"),
    ({"every_n_steps": 0}, ValueError, r"expected an integer >= 1 or None, found 0"),
    ({"every_n_steps": 2.0}, TypeError, r"expected an integer >= 1 or None, found float 2.0"),
    ({"every_n_steps": True}, TypeError, r"found bool True"),
    ({"heads": "heads"}, ValueError, r"expected one of 'dim', 'head', found 'heads'. Write `heads='head'`"),
    ({"heads": 1}, TypeError, r"expected one of 'dim', 'head', found int 1"),
    ({"losses": Taylor()}, TypeError, r"Write a list: `losses=\[Taylor\(\)\]`"),
    ({"losses": [Taylor(), "cubic"]}, TypeError, r"expected a sequence of Criterion or None, found str 'cubic'"),
    ({"remaining": {"a": 50}}, ValueError, r"`Method\(remaining={'a': 50}\)`: .* not a percentage: write `0.5`"),
    ({"remaining": {1: 0.5}}, TypeError, r"expected a mapping of string to 0 < value <= 1"),
    ({"remaining": 0.5}, TypeError, r"found float 0.5"),
    ({"widths": (1, 2, 3)}, TypeError, r"expected a tuple of integer >= 1, integer >= 1, found tuple"),
    ({"widths": (1, 0)}, ValueError, r"found 0"),
    ({"start": -1}, ValueError, r"expected an epoch \(int >= 0\) or a fraction of the run"),
    ({"start": 1.5}, ValueError, r"For epoch 5 write `start=5`"),
    ({"scale": 0.0}, ValueError, r"expected a number > 0, found 0.0"),
    ({"scale": float("inf")}, ValueError, r"found inf"),
    ({"scale": float("nan")}, ValueError, r"found nan"),
    ({"scale": "0.5"}, TypeError, r"expected a number > 0, found str '0.5'"),
    ({"scale": np.float32(0.5)}, TypeError, r"Convert it to a number of Python: `scale=value.item\(\)`"),
    ({"scale": torch.tensor(0.5)}, TypeError, r"found Tensor. Convert it to a number of Python"),
    ({"penalty": -1e-3}, ValueError, r"expected a number >= 0"),
    ({"warmup": np.int64(2)}, TypeError, r"Convert it to a number of Python"),
    ({"amount": 40}, ValueError, r"expected 0 <= amount <= 1, found 40. .* not a percentage: write `amount=0.4`"),
    ({"predicate": 3}, TypeError, r"expected a callable or None"),
    ({"teacher": "resnet"}, TypeError, r"expected a Module or None, found str 'resnet'"),
    ({"teacher": nn.Linear}, TypeError, r"found the class Linear. Pass an instance"),
    ({"module": nn.Identity()}, TypeError, r"`Method\(module=Identity\(...\)\)`: expected a class derived from Module"),
    ({"module": int}, TypeError, r"expected a class derived from Module or None, found the class int"),
    ({"path": 3}, TypeError, r"expected a string or a Path, found int 3"),
    ({"dry_run": 1}, TypeError, r"expected True or False, found int 1"),
    ({"criteron": Taylor()}, TypeError, r"unexpected keyword argument 'criteron'. Write `criterion=...`"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=str)
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        Method(**arguments)
    assert str(caught.value).startswith("`Method(")


def test_a_function_is_checked_too() -> None:
    @validated
    def prune(model: nn.Module, example: Any, *others: PositiveInt, rule: Range, **counts: PositiveInt) -> str:
        """Prune."""
        return "pruned"

    net = nn.Identity()
    assert prune(net, None, 1, 2, rule=Energy(), steps=3) == "pruned"
    assert (prune.__name__, prune.__doc__) == ("prune", "Prune.")
    assert list(inspect.signature(prune).parameters) == ["model", "example", "others", "rule", "counts"]
    with pytest.raises(TypeError, match=r"`prune\(...\)`: missing a required .*argument: 'rule'. Its arguments: model"):
        prune(net, None)
    with pytest.raises(TypeError, match=r"`prune\(model=int\)`: expected a Module, found the class int"):
        prune(int, None, rule=Energy())
    with pytest.raises(ValueError, match=r"`prune\(others=0\)`: expected an integer >= 1"):
        prune(net, None, 0, rule=Energy())
    with pytest.raises(ValueError, match=r"`prune\(counts=-1\)`"):
        prune(net, None, rule=Energy(), steps=-1)


def test_a_value_stays_a_value() -> None:
    energy = Energy(0.5, needed=7)
    assert eval(repr(energy)) == energy
    assert hash(eval(repr(energy))) == hash(energy)
    assert pickle.loads(pickle.dumps(energy)) == copy.deepcopy(energy) == copy.copy(energy) == energy
    assert dataclasses.replace(energy, kept=0.7) == Energy(0.7, needed=7)
    assert list(inspect.signature(Energy).parameters) == ["kept", "needed"]
    with pytest.raises(ValueError, match=r"`Energy\(kept=7\)`: expected 0 < kept <= 1"):
        dataclasses.replace(energy, kept=7)


def test_a_subclass_is_held_to_its_own_signature() -> None:
    class Mine(Method):
        def __init__(self, criterion: str) -> None:
            super().__init__(criterion={"taylor": Taylor(), "none": None}[criterion])

    class Same(Method):
        pass

    @dataclass(frozen=True)
    class Wider(Energy):
        kept: str = "all"  # type: ignore[assignment]

    assert Mine("taylor").criterion == Taylor()
    with pytest.raises(TypeError, match=r"`Method\(criterion=None\)`"):
        Mine("none")
    with pytest.raises(TypeError, match=r"`Same\(criterion=3\)`"):
        Same(criterion=3)
    assert Wider("half").kept == "half"


def test_a_subclass_of_a_value_inherits_the_checks_of_its_fields() -> None:
    @validated
    @dataclass(frozen=True)
    class Twice(Energy):
        times: PositiveInt = 2

    assert Twice(0.5, 3).times == 3
    with pytest.raises(ValueError, match=r"`Twice\(kept=2\)`"):
        Twice(2)
    with pytest.raises(ValueError, match=r"`Twice\(times=0\)`"):
        Twice(times=0)


def test_an_annotation_that_is_not_importable_is_named() -> None:
    @validated
    def fit(module: LightningModule) -> None: ...

    with pytest.raises(TypeError, match=r"found `LightningModule`, which is not. Import it outside of `if TYPE_CHECK"):
        fit(None)


def test_the_wrong_order_of_decorators_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Put it above `@dataclass`"):

        @dataclass
        @validated
        class Wrong:
            kept: float = 0.5


def modules() -> list[str]:
    return [
        m.name for m in pkgutil.walk_packages(lightning_light.__path__, "lightning_light.") if "__main__" not in m.name
    ]


@pytest.mark.parametrize("name", modules())
def test_every_annotation_of_the_package_that_is_checked_can_be_resolved(name: str) -> None:
    module = importlib.import_module(name)
    for value in vars(module).values():
        target = value.__init__ if isinstance(value, type) else value
        if inspect.isfunction(target) and target.__code__.co_name == "wrapper" and hasattr(target, "__wrapped__"):
            assert annotations_of(value if isinstance(value, type) else inspect.unwrap(value)) is not None


def test_yaml_builds_what_is_validated(tmp_path: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--callbacks", type=list[Callback])
    (tmp_path / "config.yaml").write_text(
        f"""
callbacks:
  - class_path: {__name__}.Method
    init_args:
      rule: {{class_path: {__name__}.Energy, init_args: {{kept: 0.5, needed: 2}}}}
      criterion: lightning_light.criteria.Taylor
      every_n_steps: 20
      heads: head
      remaining: {{"encoder.*": 0.5}}
      start: 3
      amount: 1
"""
    )
    (method,) = instantiate(parser, parser.parse_args([f"--config={tmp_path}/config.yaml"])).callbacks
    assert (method.rule, method.criterion, method.every_n_steps) == (Energy(0.5, needed=2), Taylor(), 20)
    assert (method.remaining, type(method.start)) == ({"encoder.*": 0.5}, int)
    assert method.schedule == Window(Cubic(), start=0.1, end=0.6)


@pytest.mark.parametrize(("text", "kind"), [("1", int), ("1.0", float), ("0", int), ("0.0", float)])
def test_yaml_keeps_an_epoch_and_a_fraction_apart(text: str, kind: type) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Method, "method")
    assert type(instantiate(parser, parser.parse_args([f"--method.start={text}"])).method.start) is kind


def test_yaml_gives_the_same_sentence() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Method, "method")
    with pytest.raises(ValueError, match=r"`Method\(amount=40.*\)`: expected 0 <= amount <= 1"):
        instantiate(parser, parser.parse_args(["--method.amount=40"]))


def instantiate(parser: ArgumentParser, arguments: Any) -> Any:
    return getattr(parser, "instantiate", None or parser.instantiate_classes)(arguments)
