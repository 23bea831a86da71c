"""`Reparameterization` in a Trainer: when branches are merged, what is counted, what later methods and exports see."""

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from torch import nn

from lightning_light.budgets import MACs, Params, Size, Sparsity
from lightning_light.errors import NoEffectWarning, OrderError, TargetError, UnsupportedError
from lightning_light.measure.cost import count_cost
from lightning_light.merging import merge_blocks
from lightning_light.order import Stage
from lightning_light.quantization import Int8, QuantizationAwareTraining
from lightning_light.reparameterization import ACB, DBB, OREPA, Branches, Reparameterization, RepVGG, expand_branches
from lightning_light.reparameterization.apply import branched_layers
from lightning_light.schedules import Linear, OneShot, Window
from lightning_light.sparsity import WeightPruning
from lightning_light.structured import StructuredPruning, prune_channels
from lightning_light.surgery.attachment import attach, state_of
from lightning_light.surgery.averaged_models import averaged_models_of
from tests.contract.bodies import Body, module_class
from tests.contract.runs import DEFAULT_HOST, shapes, trainer
from tests.zoo import Depthwise, Plain, Residual, noise

FORMS = [ACB(), RepVGG(), Branches(3), DBB(), OREPA()]


def fresh(body: type[Body] = Body) -> Any:
    torch.manual_seed(3)
    return module_class(body, DEFAULT_HOST)()


class WithPointwise(Body):
    """One of its convolutions has a 1x1 kernel."""

    def make(self) -> None:
        super().make()
        self.features.point = nn.Conv2d(12, 12, 1)


def masks(start: float) -> WeightPruning:
    return WeightPruning(Sparsity(0.5), schedule=Window(Linear(), start=start, end=start + 0.2))


class Outputs(Callback):
    """The outputs of the network and of its averaged copies around every batch start, and the number of branches."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, list[torch.Tensor]]] = []

    def look(self, run: Any, module: Any) -> None:
        networks = [module, *averaged_models_of(run, module)]
        images, training = module.train_dataloader().batches[0][0], module.training
        with torch.no_grad():
            outputs = [network.eval()(images) for network in networks]
        for network in networks:
            network.train(training)
        self.seen.append((len(branched_layers(module)), outputs))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.look(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.look(trainer, pl_module)


@pytest.mark.parametrize("averaged", [False, True])
def test_every_change_preserves_the_function_of_the_network_and_of_its_average(averaged: bool) -> None:
    module, outputs = fresh(), Outputs()
    average = [EMAWeightAveraging(decay=0.5)] if averaged else []
    trainer(*average, Reparameterization(ACB(), start=0.25, merge=0.75), outputs).fit(module)
    changes = [
        (before, after) for before, after in zip(outputs.seen, outputs.seen[1:], strict=False) if before[0] != after[0]
    ]
    assert [(before[0], after[0]) for before, after in changes] == [(0, 4), (4, 0)]
    for (_, before), (_, after) in changes:
        assert len(before) == len(after) == 1 + averaged
        for old, new in zip(before, after, strict=True):
            torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-5)


def test_an_initial_scale_is_that_of_the_network_and_of_its_average() -> None:
    seen: list[bool] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            for network in (pl_module, *averaged_models_of(trainer, pl_module)):
                layers = branched_layers(network).values()
                seen.extend(bool((branch.scale == 0.5).all()) for layer in layers for branch in layer.branches)

    average = EMAWeightAveraging(decay=0.5)
    method = Reparameterization(OREPA(), start=0.25, initial_scale=0.5)
    trainer(average, method, Look()).fit(fresh())
    assert seen[:24] == [True] * 24  # two networks of four convolutions with three branches, when they are added
    assert False in seen[24:]


@pytest.mark.parametrize(
    "later",
    [lambda: masks(0.5), lambda: QuantizationAwareTraining(Int8(), start=0.5, calibration_batches=2)],
    ids=["masks", "quantization"],
)
def test_branches_are_merged_when_the_first_later_method_begins(later: Any) -> None:
    module, outputs = fresh(), Outputs()
    trainer(Reparameterization(ACB()), later(), outputs).fit(module)
    counts = [count for count, _ in outputs.seen]
    assert counts == [4] * 12 + [0] * 12, "merged before the seventh of twelve batches"
    assert [entry["op"] for entry in state_of(module).edit_log] == [
        "reparameterization/expand",
        "reparameterization/merge",
    ]


def test_a_second_fit_trains_the_branches_of_the_first_without_a_warning(recwarn) -> None:
    module = fresh()
    for _ in range(2):
        trainer(Reparameterization(RepVGG()), max_epochs=1).fit(module)
        assert len(branched_layers(module)) == 4
    assert not [one for one in recwarn if issubclass(one.category, NoEffectWarning)]


def test_without_a_later_method_the_branches_stay_until_they_are_merged() -> None:
    module = fresh()
    trainer(Reparameterization(RepVGG())).fit(module)
    images = module.train_dataloader().batches[0][0]
    assert len(branched_layers(module)) == 4
    before = module.eval()(images)
    assert set(merge_blocks(module)) == {f"features.{name}" for name in ("stem", "conv1", "conv2", "last")}
    torch.testing.assert_close(module(images), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("callbacks", "sentence"),
    [
        ([Reparameterization(ACB(), merge=0.6), masks(0.4)], "before it begins at 40% of the run.*found 60%"),
        ([masks(0.4), Reparameterization(ACB())], "it comes first in `callbacks`"),
        ([QuantizationAwareTraining(Int8(), start=0.3), Reparameterization(ACB(), merge=0.3)], "it comes first"),
    ],
)
def test_branches_that_would_be_merged_too_late_are_refused_with_the_order(callbacks: Any, sentence: str) -> None:
    module = fresh()
    before = shapes(module)
    with pytest.raises(OrderError, match=sentence):
        trainer(*callbacks).fit(module)
    assert shapes(module) == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"start": 0.5, "merge": 0.5}, r"Reparameterization\(start=0.5, merge=0.5\).*after they are expanded"),
        ({"start": 2, "merge": 1}, "after they are expanded"),
    ],
)
def test_merging_before_expanding_is_refused_at_construction(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Reparameterization(ACB(), **arguments)


def test_moments_of_both_kinds_are_compared_when_the_run_is_known() -> None:
    with pytest.raises(ValueError, match="an expansion at 67% and a merging at 50% of the run"):
        trainer(Reparameterization(ACB(), start=2, merge=0.5)).fit(fresh())


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"form": "acb"}, TypeError, "expected a Form"),
        ({"form": ACB}, TypeError, "expected a Form"),
        ({"form": ACB(), "start": 1.5}, ValueError, "fraction of the run"),
        ({"form": ACB(), "merge": -1}, ValueError, "an epoch"),
        ({"form": ACB(), "targets": 3}, TypeError, "expected"),
    ],
)
def test_wrong_arguments_are_refused_at_construction(arguments: Any, error: Any, sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        Reparameterization(**arguments)


def test_targets_that_match_nothing_are_refused_before_training() -> None:
    module = fresh()
    with pytest.raises(TargetError, match="nothing"):
        trainer(Reparameterization(ACB(), targets="nothing*")).fit(module)
    assert not module.losses


@pytest.mark.parametrize("form", FORMS, ids=repr)
@pytest.mark.parametrize("budget", [MACs(0.5), Params(0.5), Size("1 MB")], ids=repr)
def test_budgets_count_the_merged_network(form: Any, budget: Any) -> None:
    module = fresh()
    example = module.train_dataloader().batches[0][0]
    plain, cost = budget.measure(module, _call(example)), count_cost(module, (example,))
    costs = budget.tensor_costs(module, _call(example))
    expand_branches(module, None, form)
    assert budget.measure(module, _call(example)) == plain
    assert count_cost(module, (example,)).macs == cost.macs
    assert count_cost(module, (example,)).params == cost.params
    assert sum(budget.tensor_costs(module, _call(example)).values()) == pytest.approx(sum(costs.values()))


def _call(example: Any) -> Any:
    from lightning_light.example_input import ExampleInput

    return ExampleInput.of(example)


@pytest.mark.parametrize("form", FORMS, ids=repr)
@pytest.mark.parametrize("network", [Plain, Residual, Depthwise], ids=lambda kind: kind.__name__)
def test_channels_are_pruned_across_branches(form: Any, network: Any) -> None:
    torch.manual_seed(0)
    model, x = network(), noise(2, 3, 8, 8)
    dense = count_cost(model, (x,)).macs
    expand_branches(model, x, form)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    prune_channels(model, x, MACs(0.6))
    before = model.eval()(x)
    merge_blocks(model)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert not branched_layers(model)
    assert 0.4 * dense <= count_cost(model, (x,)).macs <= 0.6 * dense


def test_a_chain_reaches_its_budget_on_the_merged_network() -> None:
    module = fresh()
    example = module.train_dataloader().batches[0][0]
    dense = count_cost(module, (example,)).macs
    pruning = StructuredPruning(MACs(0.6), schedule=OneShot(at=0.3))
    trainer(Reparameterization(ACB(), start=0.1, merge=0.6), pruning).fit(module)
    assert not branched_layers(module)
    assert 0.4 * dense <= count_cost(module, (example,)).macs <= 0.6 * dense


def test_merged_kernels_leave_the_network_as_it_was_built() -> None:
    module = fresh()
    before = shapes(module)
    trainer(Reparameterization(OREPA(), start=0.2, merge=0.8)).fit(module)
    assert shapes(module) == before
    assert [entry["op"].rpartition("/")[2] for entry in state_of(module).edit_log] == ["expand", "merge"]


def test_a_layer_that_is_masked_is_not_expanded() -> None:
    module = fresh()
    attach(module).claim(module, "weight_pruning", Stage.MASKS, ["features.conv1"])
    module_before = shapes(module)
    with pytest.raises(UnsupportedError, match="Use `reparameterization` first and `weight_pruning` afterwards"):
        expand_branches(module, None, ACB())
    assert shapes(module) == module_before


def test_what_was_expanded_and_what_was_left_alone_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", "lightning.pytorch"):
        trainer(Reparameterization(RepVGG()), max_epochs=1).fit(fresh(WithPointwise))
    found = [record for record in caplog.records if record.message.startswith("reparameterization:")]
    brief, line = (next(one.message for one in found if one.levelname == level) for level in ("INFO", "DEBUG"))
    assert brief.startswith("reparameterization: expanded ")
    assert "features.conv1" in line.partition("Left alone:")[0]
    assert "features.point (RepVGG has no branches for a 1x1 kernel)" in line.partition("Left alone:")[2]
