"""A request that cannot be met is refused with module and optimizer unchanged, whatever the method and its schedule."""

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch
import pytest

from lightning_light.budgets import MACs, Params, Size, Sparsity
from lightning_light.clustering import WeightClustering
from lightning_light.errors import BudgetError, LightningLightError, TargetError, UnsupportedError
from lightning_light.lowrank import LowRankFactorization
from lightning_light.quantization import Int8, QuantizationAwareTraining
from lightning_light.schedules import Cubic, Linear, OneShot, Schedule, Staircase, Window
from lightning_light.sparsity import DynamicSparseTraining, WeightPruning
from lightning_light.structured import StructuredPruning
from tests.contract.bodies import Body, module_class
from tests.contract.runs import differences, trainer

Build = Callable[[Schedule], Any]
LIT = module_class(Body, lightning.pytorch)

SCHEDULES: dict[str, Schedule] = {
    "at_once": OneShot(),
    "late": OneShot(at=0.9),
    "gradual": Window(Cubic(), start=0.0, end=0.8),
    "epochs": Window(Linear(), start=1, end=2),
    "jumps": Window(Staircase(Linear(), steps=3), start=0.1, end=0.9),
}


def start_of(schedule: Schedule) -> int | float:
    """The moment at which a method without a schedule starts."""
    return schedule.start if isinstance(schedule, Window) else schedule.span()[0]


METHODS: dict[str, Callable[..., Any]] = {
    "structured": lambda budget, schedule, **options: StructuredPruning(budget, schedule=schedule, **options),
    "weights": lambda budget, schedule, **options: WeightPruning(budget, schedule=schedule, **options),
    "dynamic": lambda budget, schedule, **options: DynamicSparseTraining(budget, schedule=schedule, **options),
    "low_rank": lambda budget, schedule, **options: LowRankFactorization(budget, schedule=schedule, **options),
    "clustering": lambda clusters, schedule, **options: WeightClustering(clusters, start=start_of(schedule), **options),
    "quantization": lambda recipe, schedule, **options: QuantizationAwareTraining(
        recipe, start=start_of(schedule), **options
    ),
}

UNREACHABLE = [
    ("structured", MACs(0.001)),
    ("structured", Params(0.001)),
    ("structured", Size("100 B")),
    ("weights", Sparsity(0.9999)),
    ("dynamic", Sparsity(0.9999)),
    ("low_rank", MACs(0.001)),
    ("low_rank", Params(0.001)),
    ("low_rank", Size("100 B")),
]
REACHABLE = {
    "structured": MACs(0.7),
    "weights": Sparsity(0.5),
    "dynamic": Sparsity(0.5),
    "low_rank": MACs(0.7),
    "clustering": 8,
    "quantization": Int8(),
}
EARLIER = ["structured", "weights", "dynamic", "low_rank"]  # than clustering and quantization

by_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))


class Snapshots(lightning.pytorch.Callback):
    """Copy module and optimizers in every hook in which the methods behind it in the list may act."""

    def __init__(self) -> None:
        self.last: Any = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.last = contents(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.last = contents(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.last = contents(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.last = contents(trainer, pl_module)


def contents(run: Any, module: Any) -> dict[str, Any]:
    """Copy everything that a method may change."""
    found = {
        "modules": {name: type(part).__name__ for name, part in module.named_modules()},
        "shapes": {name: tuple(parameter.shape) for name, parameter in module.named_parameters()},
        "weights": dict(module.state_dict()),
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
    }
    return copy.deepcopy(found)


def assert_refused_unchanged(method: Any, error: type[LightningLightError], module: Any) -> None:
    """Fit with ``method``, which raises ``error``, and compare with what there was before it acted."""
    snapshots = Snapshots()
    run = trainer(snapshots, method)
    before = contents(run, module)
    with pytest.raises(error):
        run.fit(module)
    last = snapshots.last or before  # refused in `setup`
    assert not differences(last, contents(run, module))


@by_schedule
@pytest.mark.parametrize(("method", "budget"), UNREACHABLE, ids=[f"{name}-{budget}" for name, budget in UNREACHABLE])
def test_unreachable_budget_changes_nothing(method, budget, schedule) -> None:
    assert_refused_unchanged(METHODS[method](budget, schedule), BudgetError, LIT())


@by_schedule
@pytest.mark.parametrize("method", [name for name in METHODS if name != "quantization"])
def test_targets_that_match_nothing_change_nothing(method, schedule) -> None:
    build = METHODS[method]
    assert_refused_unchanged(build(REACHABLE[method], schedule, targets="nothing"), TargetError, LIT())


@by_schedule
def test_excluded_layers_that_do_not_exist_change_nothing(schedule) -> None:
    method = METHODS["quantization"](Int8(exclude="nothing"), schedule)
    assert_refused_unchanged(method, TargetError, LIT())


@functools.cache
def clustered() -> Any:
    module = LIT()
    trainer(WeightClustering(8, start=0.5), max_epochs=1).fit(module)
    return module


@functools.cache
def quantized() -> Any:
    module = LIT()
    trainer(QuantizationAwareTraining(Int8(), start=0.0, calibration_batches=2), max_epochs=1).fit(module)
    return module


def methods_before_a_later_one() -> Iterator[Any]:
    """Every two of method, later method and schedule."""
    for (number, method), (place, schedule) in itertools.product(enumerate(EARLIER), enumerate(SCHEDULES)):
        later = (clustered, quantized)[(number + place) % 2]
        yield pytest.param(method, later, SCHEDULES[schedule], id=f"{method}-{later.__name__}-{schedule}")


@pytest.mark.parametrize(("method", "later", "schedule"), list(methods_before_a_later_one()))
def test_layers_of_a_later_method_change_nothing(method, later, schedule) -> None:
    assert_refused_unchanged(METHODS[method](REACHABLE[method], schedule), UnsupportedError, copy.deepcopy(later()))
