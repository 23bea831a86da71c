"""Requests that cannot be met are refused before the first change, under every schedule."""

import copy
from collections.abc import Callable
from typing import Any

import lightning.pytorch
import pytest
import torch
from torch import Tensor, nn

import lightning_light as ll
from lightning_light.errors import BudgetError, LightningLightError, TargetError, UnsupportedError
from lightning_light.sparsity import SRSTE
from lightning_light.surgery.attachment import state_of
from tests.contract.bodies import Momentum, module_class
from tests.contract.runs import trainer
from tests.sparsity.runs import fitted

NO_STEM = ll.Targets(exclude="features.stem")
RISING = [ll.OneShot(), ll.OneShot(at=0.9), ll.Window(ll.Cubic()), ll.Window(ll.schedules.Linear(), start=1, end=2)]
FALLING = [ll.sparsity.Alternating(phases=2), ll.sparsity.DenseSparseDense()]
REWINDING = [ll.sparsity.Rewinding(ll.OneShot(at=0.5))]


class Trained(Momentum):
    """A module with an optimizer that it keeps, which has taken a step already."""

    def configure_optimizers(self) -> Any:
        if not hasattr(self, "optimizer"):
            parameters = list(self.parameters())  # type: ignore[attr-defined]
            vars(self)["optimizer"] = torch.optim.SGD(parameters, 0.05, momentum=0.9)
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            self.optimizer.step()
        return self.optimizer


def snapshot(module: Any) -> tuple[dict[str, Tensor], Any]:
    optimizer = module.configure_optimizers()
    return copy.deepcopy(dict(module.state_dict())), copy.deepcopy(optimizer.state_dict())


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def pruning(**options: Any) -> Callable[[Any], Any]:
    return lambda schedule: ll.WeightPruning(schedule=schedule, **{"every_n_steps": 1, **options})


WEIGHTS: dict[str, tuple[Callable[[Any], Any], type[LightningLightError]]] = {
    "no layer of that name": (pruning(budget=ll.Sparsity(0.5), targets="nothing"), TargetError),
    "no weight in the targets": (pruning(budget=ll.Sparsity(0.5), targets=nn.BatchNorm2d), TargetError),
    "pattern that does not divide": (pruning(pattern=ll.NM(2, 4)), TargetError),
    "block that does not divide": (pruning(budget=ll.Sparsity(0.5), pattern=ll.Block(7, 1)), TargetError),
    "global budget out of reach": (pruning(budget=ll.Sparsity(0.9999)), BudgetError),
    "filters out of reach": (pruning(budget=ll.Sparsity(0.97), pattern=ll.patterns.Filter()), BudgetError),
    "own sparsity of an unknown layer": (
        pruning(budget=ll.Sparsity(0.5), remaining={"nothing": 0.5}),
        TargetError,
    ),
}


def refused(callback: Any, error: type[LightningLightError], module: Any) -> None:
    before = snapshot(module)
    with pytest.raises(error):
        trainer(callback).fit(module)
    assert same(before, snapshot(module))


@pytest.mark.parametrize("schedule", [*RISING, *FALLING, *REWINDING], ids=repr)
@pytest.mark.parametrize("request_", list(WEIGHTS))
def test_weight_pruning_changes_nothing_when_it_refuses(request_, schedule) -> None:
    build, error = WEIGHTS[request_]
    refused(build(schedule), error, module_class(Trained, lightning.pytorch)())


@pytest.mark.parametrize("schedule", RISING, ids=repr)
@pytest.mark.parametrize(
    ("build", "error"),
    [
        (lambda schedule: SRSTE(schedule=schedule), TargetError),
        (lambda schedule: SRSTE(schedule=schedule, targets="nothing"), TargetError),
        (lambda schedule: ll.DynamicSparseTraining(ll.Sparsity(0.9999), schedule=schedule), BudgetError),
        (lambda schedule: ll.DynamicSparseTraining(ll.Sparsity(0.5), schedule=schedule, targets="x"), TargetError),
    ],
    ids=["sr_ste_pattern", "sr_ste_targets", "dynamic_budget", "dynamic_targets"],
)
def test_other_methods_change_nothing_when_they_refuse(build, error, schedule) -> None:
    refused(build(schedule), error, module_class(Trained, lightning.pytorch)())


@pytest.mark.parametrize("schedule", RISING, ids=repr)
def test_a_sparsity_below_that_of_existing_masks_is_refused_under_a_rising_schedule(schedule) -> None:
    _, module = fitted(ll.WeightPruning(ll.Sparsity(0.8), schedule=ll.OneShot()), body=Trained)
    state = copy.deepcopy(state_of(module).state)
    before = snapshot(module)
    with pytest.raises(
        BudgetError, match=r"expected at least the sparsity of the masks from an earlier run, found 0\.7999"
    ):
        trainer(ll.WeightPruning(ll.Sparsity(0.5), schedule=schedule)).fit(module)
    assert same(before, snapshot(module))
    assert same(state, state_of(module).state)


def test_the_same_sparsity_is_reached_by_a_schedule_that_selects_new_masks() -> None:
    _, module = fitted(ll.WeightPruning(ll.Sparsity(0.8), schedule=ll.OneShot()), body=Momentum)
    trainer(ll.WeightPruning(ll.Sparsity(0.5), schedule=ll.sparsity.Alternating(phases=2))).fit(module)
    assert ll.measure_sparsity(module).sparsity == pytest.approx(0.5, abs=1e-2)


@pytest.mark.parametrize(
    "change",
    [
        lambda module: trainer(ll.WeightPruning(ll.Sparsity(0.5))).fit(module),
        lambda module: trainer(ll.DynamicSparseTraining(ll.Sparsity(0.5))).fit(module),
        lambda module: trainer(SRSTE(targets=NO_STEM)).fit(module),
        lambda module: ll.prune_weights(module, None, ll.Sparsity(0.5)),
    ],
    ids=["weight_pruning", "dynamic", "sr_ste", "function"],
)
def test_layers_of_a_later_method_are_refused(change) -> None:
    module = module_class(Trained, lightning.pytorch)()
    trainer(ll.WeightClustering(4, start=0.5)).fit(module)
    before = snapshot(module)
    with pytest.raises(UnsupportedError, match=r"`weight_clustering` owns"):
        change(module)
    assert same(before, snapshot(module))


@pytest.mark.parametrize(
    "criterion", [ll.Taylor(), ll.criteria.Wanda(), ll.criteria.Activation(), ll.criteria.Movement()], ids=repr
)
def test_every_criterion_of_evidence_masks_in_a_run(criterion) -> None:
    pruning = ll.WeightPruning(
        ll.Sparsity(0.5), criterion=criterion, schedule=ll.OneShot(at=0.5), calibration_batches=2, scope="local"
    )
    _, module = fitted(pruning, body=Momentum)
    assert ll.measure_sparsity(module).sparsity == pytest.approx(0.5, abs=1e-2)
