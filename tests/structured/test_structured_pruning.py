"""`StructuredPruning` in a Trainer: the run is planned before the first change; evidence, batch norm, refusals."""

import copy
import logging
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_light.budgets import Channels, Latency, MACs, Params, Size, Sparsity
from lightning_light.callback import CompressionCallback
from lightning_light.criteria import (
    SNIP,
    Activation,
    BatchNormScale,
    Criterion,
    Hessian,
    LearnedGates,
    Magnitude,
    Movement,
    SoftMovement,
    Taylor,
    Wanda,
)
from lightning_light.errors import BudgetError, NoEffectWarning, TargetError, TraceError, UnsupportedError
from lightning_light.measure.cost import count_cost
from lightning_light.order import Stage
from lightning_light.quantization import Int8, quantize
from lightning_light.schedules import Constant, Cosine, Cubic, Exponential, Linear, OneShot, Schedule, Staircase, Window
from lightning_light.sparsity import Alternating
from lightning_light.structured import (
    Global,
    GroupLasso,
    GrowingRegularization,
    Sensitivity,
    StructuredPruning,
    Widths,
    prune_channels,
)
from lightning_light.surgery.attachment import attach
from tests.contract.bodies import Body, module_class
from tests.contract.runs import DEFAULT_HOST, checkpoints, differences, outcome, shapes, trainer
from tests.zoo import noise


class WithExample(Body):
    """Its example input is known before the first batch."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__(lr)
        self.example_input_array = torch.zeros(2, 3, 8, 8)


def body(kind: type[Body] = Body) -> Any:
    return module_class(kind, DEFAULT_HOST)()


def macs(module: Any) -> float:
    return count_cost(module, (torch.zeros(1, 3, 8, 8),)).macs


# The whole run is planned before the first change.

SCHEDULES: list[Schedule] = [
    StructuredPruning(MACs(0.5)).schedule,
    OneShot(),
    OneShot(at=0.5),
    Constant(1.0),
    Linear(),
    Cosine(),
    Exponential(),
    Staircase(Linear(), 3),
    Window(Cubic(), start=0.0, end=1.0),
    Window(Linear(), start=1, end=3),
]
IMPOSSIBLE: dict[str, Any] = {
    "macs": lambda: StructuredPruning(MACs(0.001)),
    "params": lambda: StructuredPruning(Params(0.001)),
    "channels": lambda: StructuredPruning(Channels(0.01)),
    "size": lambda: StructuredPruning(Size(100)),
    "latency": lambda: StructuredPruning(Latency("1 ns")),
    "widths": lambda: StructuredPruning(MACs(0.5), widths=Widths(min_remaining=0.9)),
    "rounding": lambda: StructuredPruning(MACs(0.3), widths=Widths(round_to=8)),
    "remaining": lambda: StructuredPruning(MACs(0.3), remaining={"features.*": 1.0}),
    "targets": lambda: StructuredPruning(MACs(0.2), targets="features.conv2"),
    "unscored": lambda: StructuredPruning(MACs(0.5), criterion=BatchNormScale()),  # `features.last` has none
}


@pytest.mark.parametrize(
    ("request_", "schedule"),
    [(name, when) for x, name in enumerate(IMPOSSIBLE) for y, when in enumerate(SCHEDULES) if (x + y) % 3 == 0],
    ids=repr,
)
def test_impossible_request_leaves_module_and_optimizer_unchanged(request_, schedule) -> None:
    """Under any schedule, with module, buffers and optimizer state equal to the last bit."""
    module, fresh = body(WithExample), body(WithExample)
    pruning = IMPOSSIBLE[request_]()
    pruning.schedule = schedule
    run = trainer(pruning)
    with pytest.raises((BudgetError, UnsupportedError)):
        run.fit(module)
    assert not differences(dict(fresh.state_dict()), dict(module.state_dict()))
    assert not module.losses
    assert all(not optimizer.state for optimizer in run.optimizers)


@pytest.mark.parametrize("request_", ["macs", "widths", "unscored"])
def test_impossible_request_is_refused_before_the_first_optimizer_step(request_) -> None:
    """Where the example input is the first batch: the training step has not run once."""
    module, fresh = body(), body()
    run = trainer(IMPOSSIBLE[request_]())
    with pytest.raises((BudgetError, UnsupportedError)):
        run.fit(module)
    assert not differences(dict(fresh.named_parameters()), dict(module.named_parameters()))
    assert not module.losses
    assert all(not optimizer.state for optimizer in run.optimizers)


class Quantizer(CompressionCallback):
    """Claims layers as a later method does."""

    method, stage, structural = "quantizer", Stage.QUANTIZATION, False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2:
            self.compression_state(pl_module).claim(pl_module, self.method, self.stage, ["features"])


def test_layers_of_a_later_method_are_refused_before_the_first_batch() -> None:
    module = body(WithExample)
    attach(module).claim(module, "quantizer", Stage.QUANTIZATION, ["features.conv1"])
    with pytest.raises(UnsupportedError, match=r"`structured_pruning` on `features.conv1`.*`quantizer`"):
        trainer(StructuredPruning(MACs(0.5))).fit(module)
    assert shapes(module) == shapes(body())
    assert not module.losses


def test_a_module_quantized_by_this_package_is_refused_before_the_first_batch() -> None:
    module = body(WithExample)
    quantize(module, noise(4, 3, 8, 8), Int8())
    with pytest.raises(UnsupportedError, match="`quantization_aware_training` owns"):
        trainer(StructuredPruning(MACs(0.5))).fit(module)
    assert shapes(module) == shapes(body())
    assert not module.losses


def test_a_network_that_meets_the_budget_may_have_layers_of_a_later_method() -> None:
    """As in a second fit of the same callbacks."""
    module = body(WithExample)
    prune_channels(module, module.example_input_array, MACs(0.5))
    attach(module).claim(module, "quantizer", Stage.QUANTIZATION, ["features"])
    before = shapes(module)
    with pytest.warns(NoEffectWarning, match="meets the budget as it is"):
        trainer(StructuredPruning(MACs(0.5))).fit(module)
    assert shapes(module) == before


def test_layers_claimed_during_the_run_are_refused_before_the_next_cut() -> None:
    module = body(WithExample)
    with pytest.raises(UnsupportedError, match="`quantizer`"):
        trainer(StructuredPruning(MACs(0.5), schedule=OneShot(at=0.5)), Quantizer()).fit(module)
    assert shapes(module) == shapes(body())


def test_layers_of_a_later_method_are_refused_to_the_function() -> None:
    net = body().features
    attach(net).claim(net, "quantizer", Stage.QUANTIZATION, ["conv1"])
    with pytest.raises(UnsupportedError, match=r"`structured_pruning` on `conv1`"):
        prune_channels(net, noise(2, 3, 8, 8), MACs(0.5))
    assert shapes(net) == shapes(body().features)


def test_two_budgets_in_one_run_count_from_the_same_network() -> None:
    module = body()
    trainer(StructuredPruning(MACs(0.7)), StructuredPruning(MACs(0.5))).fit(module)
    assert 0.4 < macs(module) / macs(body()) <= 0.5


def test_second_budget_that_the_first_meets_gives_a_warning() -> None:
    module = body()
    with pytest.warns(NoEffectWarning, match=r"meets the budget as it is: MACs\(remaining=0.7\)"):
        trainer(StructuredPruning(MACs(0.5)), StructuredPruning(MACs(0.7))).fit(module)
    assert 0.4 < macs(module) / macs(body()) <= 0.5


def test_second_fit_counts_from_the_first_network() -> None:
    module = body()
    trainer(StructuredPruning(MACs(0.7))).fit(module)
    trainer(StructuredPruning(MACs(0.6))).fit(module)
    assert 0.5 < macs(module) / macs(body()) <= 0.6


# When.


@pytest.mark.parametrize(("every_n_steps", "cuts"), [(None, 10), (2, 5), (9, 1)])
def test_cuts_are_every_n_steps_inside_the_window(every_n_steps, cuts, caplog) -> None:
    """Twelve steps, of which the window holds the first eight or more."""
    module = body(WithExample)
    caplog.set_level(logging.INFO, "lightning.pytorch")
    schedule = Window(Linear(), start=0.0, end=0.7)
    trainer(StructuredPruning(Channels(0.2), schedule=schedule, every_n_steps=every_n_steps)).fit(module)
    lines = [record.message for record in caplog.records if " removed from " in record.message]
    numbers = [int(line.partition("/")[0].rpartition(" ")[2]) for line in lines]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] <= cuts
    assert all("\n" not in line for line in lines)
    assert macs(module) < macs(body())


# Evidence.


@pytest.mark.parametrize(
    "criterion",
    [Taylor(), Hessian(), SNIP(), Activation(), Wanda(), Movement(), SoftMovement(), LearnedGates(2)],
    ids=repr,
)
def test_every_criterion_works(criterion) -> None:
    module = body()
    pruning = StructuredPruning(MACs(0.5), criterion=criterion, schedule=OneShot(at=0.5), calibration_batches=2)
    trainer(pruning).fit(module)
    assert macs(module) / macs(body()) <= 0.5


@pytest.mark.parametrize("kind", ["grad", "activation"])
def test_evidence_is_gathered_over_calibration_batches(kind) -> None:
    """A criterion sees the mean over the three batches before the cut, and over no others."""
    seen: list[Any] = []

    @dataclass(frozen=True)
    class Spy(Criterion):
        needs = frozenset({kind})
        roles = frozenset({"out"})

        def __call__(self, evidence: Any) -> Any:
            seen.append(evidence.need(kind))
            return Magnitude()(evidence)

    gathered: list[Any] = []

    class Observed(Body):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if kind == "grad":
                gathered.append(self.features.conv1.weight.grad.clone())

        def forward(self, x: Any) -> Any:
            if torch.is_grad_enabled() and kind == "activation":
                with torch.no_grad():
                    batch_norm = copy.deepcopy(self.features.bn0)
                    outputs = self.features.conv1(F.relu(batch_norm(self.features.stem(x))))
                gathered.append(outputs.abs().mean((0, 2, 3)))
            return super().forward(x)

    module = body(Observed)
    pruning = StructuredPruning(
        remaining={"features.conv1": 0.5},
        targets="features.conv1",
        criterion=Spy(),
        schedule=OneShot(at=0.5),
        calibration_batches=3,
    )
    trainer(pruning).fit(module)
    assert len(seen) == 1
    expected = torch.stack(gathered[3:6]).mean(0)
    torch.testing.assert_close(seen[0].reshape(expected.shape), expected)
    assert module.features.conv1.out_channels == 8


# Batch-norm statistics.


def statistics_error(module: Any) -> float:
    """How far the running means of the last batch norm are from those of the training data."""
    images = torch.cat([batch[0] for batch in module.train_dataloader().batches])
    features = copy.deepcopy(module.features).train()
    with torch.no_grad():
        x = F.relu(features.bn0(features.stem(images)))
        inputs = features.conv2(F.relu(features.bn1(features.conv1(x))))
    return float((module.features.bn2.running_mean - inputs.mean((0, 2, 3))).norm())


class Frozen(WithExample):
    """Batch norm stays in evaluation mode, so that training never updates its statistics."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for layer in (self.features.bn0, self.features.bn1, self.features.bn2):
            layer.eval()
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def make(self) -> None:
        super().make()
        for batch in self.train_dataloader().batches * 10:
            self.features(batch[0])


def test_statistics_are_corrected_after_the_last_cut() -> None:
    errors = {}
    for correct in (True, False):
        module = body(Frozen)
        pruning = StructuredPruning(MACs(0.5), schedule=OneShot(at=0.5), correct_batch_norm=correct)
        trainer(pruning).fit(module)
        errors[correct] = statistics_error(module)
    assert errors[True] < errors[False] / 2


def norms(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.BatchNorm2d)]


def test_statistics_stay_without_the_correction_although_the_ranking_records_inputs() -> None:
    module = body(Frozen)
    means = {name: norm.running_mean.clone() for name, norm in norms(module)}
    ranking = Sensitivity(distance="mse", batches=2)
    pruning = StructuredPruning(MACs(0.5), schedule=OneShot(at=0.5), ranking=ranking, correct_batch_norm=False)
    trainer(pruning).fit(module)
    left = {name: norm.running_mean for name, norm in norms(module)}
    assert sum(map(len, left.values())) < sum(map(len, means.values()))
    assert all(set(mean.tolist()) <= set(means[name].tolist()) for name, mean in left.items())


def test_recorded_inputs_leave_the_state_with_the_last_cut() -> None:
    module, held = body(), []

    class Look(DEFAULT_HOST.Callback):  # type: ignore[name-defined, misc]
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            state = attach(pl_module).state["structured_pruning"]
            held.append(len(state.get("inputs", [])))

    pruning = StructuredPruning(MACs(0.5), schedule=OneShot(at=0.5), calibration_batches=3)
    trainer(pruning, Look()).fit(module)
    assert held == [0, 0, 0, 1, 2, 3, 0, 0, 0, 0, 0, 0]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(("in_place", "kind"), [(True, WithExample), (False, Body)])
def test_a_module_compiled_as_a_whole_is_pruned_without_the_correction(in_place, kind) -> None:
    module = body(kind)
    compiled = module if in_place else torch.compile(module, backend="eager")
    if in_place:
        module.compile(backend="eager")
    trainer(StructuredPruning(MACs(0.5), schedule=OneShot(at=0.5))).fit(compiled)
    assert macs(module) / macs(body()) <= 0.5


# In a Trainer.


def test_dry_run_trains_as_without_it() -> None:
    plain, watched = body(), body()
    trainer().fit(plain)
    trainer(StructuredPruning(MACs(0.5), dry_run=True)).fit(watched)
    assert plain.losses == watched.losses
    assert shapes(plain) == shapes(watched)


@pytest.mark.parametrize("options", [{"targets": "backbone.*"}, {"remaining": {"backbone": 0.5}}], ids=str)
def test_patterns_that_match_nothing_are_refused_before_the_first_batch(options) -> None:
    module = body()
    with pytest.raises(TargetError, match="backbone"):
        trainer(StructuredPruning(MACs(0.5), **options)).fit(module)
    assert not module.losses


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max to specify the range")
def test_layers_prepared_by_other_tools_are_refused() -> None:
    masked = body()
    nn.utils.prune.l1_unstructured(masked.features.conv1, "weight", 0.3)
    with pytest.raises(UnsupportedError, match=r"`features.conv1`.*mask.*prune.remove"):
        trainer(StructuredPruning(MACs(0.5))).fit(masked)
    with pytest.raises(UnsupportedError, match=r"`conv1`.*mask.*prune.remove"):
        prune_channels(masked.features, noise(2, 3, 8, 8), MACs(0.5))
    prepared = body()
    prepared.features.qconfig = torch.ao.quantization.default_qat_qconfig
    torch.ao.quantization.prepare_qat(prepared.features, inplace=True)
    with pytest.raises(UnsupportedError, match=r"`features.*prepared for quantization by `torch.ao`"):
        trainer(StructuredPruning(MACs(0.5))).fit(prepared)


def test_lbfgs_is_refused_before_the_first_batch() -> None:
    class Second(Body):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())  # type: ignore[attr-defined]

    module = body(Second)
    with pytest.raises(UnsupportedError, match="LBFGS"):
        trainer(StructuredPruning(MACs(0.5))).fit(module)
    assert not module.losses


class Direct(Body):
    """The step calls the layers, not the module."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self.head(self.features(batch[0])), batch[1])
        self.losses.append(loss.item())
        return loss


@pytest.mark.parametrize("budget", [MACs(0.5), Params(0.5), Channels(0.5)], ids=repr)
def test_a_step_that_does_not_call_the_module_is_traced_itself(budget) -> None:
    module, with_example = body(Direct), body(Direct)
    run = trainer(StructuredPruning(budget))
    run.fit(module)
    with_example.example_input_array = noise(2, 3, 8, 8)
    trainer(StructuredPruning(budget)).fit(with_example)
    assert shapes(module) == shapes(with_example) != shapes(body())
    assert len(module.losses) == run.global_step
    assert module.losses == pytest.approx(with_example.losses)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_whose_step_is_traced_resumes(tmp_path) -> None:
    whole, resumed = body(Direct), body(Direct)
    run = trainer(StructuredPruning(MACs(0.5)), *checkpoints(tmp_path))
    run.fit(whole)
    again = trainer(StructuredPruning(MACs(0.5)))
    again.fit(resumed, ckpt_path=tmp_path / "step=3.ckpt")
    assert not differences(outcome(run, whole), outcome(again, resumed))


def test_a_step_that_the_trace_cannot_run_is_refused_before_the_first_optimizer_step() -> None:
    class Impossible(Direct):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if not torch.is_grad_enabled():
                raise ValueError("no gradients")
            return super().training_step(batch, batch_idx)

    module, fresh = body(Impossible), body(Impossible)
    with pytest.raises(TraceError, match=r"training_step` does not run in a trace.*no gradients.*example_input_array"):
        trainer(StructuredPruning(MACs(0.5))).fit(module)
    assert shapes(module) == shapes(fresh)


# Arguments.


class Falling(Schedule):
    def __call__(self, progress: float) -> float:
        return 1.0 - progress


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "expected a budget or `remaining`"),
    ({"budget": 0.4}, "expected a Budget"),
    ({"budget": MACs}, "MACs"),
    ({"budget": Sparsity(0.5)}, "WeightPruning"),
    ({"budget": MACs(0.5), "criterion": "l1"}, "expected a Criterion"),
    ({"budget": MACs(0.5), "criterion": Magnitude}, "expected a Criterion"),
    ({"budget": MACs(0.5), "schedule": "cubic"}, "expected a Schedule"),
    ({"budget": MACs(0.5), "schedule": Falling()}, "expected a schedule that rises"),
    ({"budget": MACs(0.5), "schedule": Alternating()}, "expected a schedule that rises"),
    ({"budget": MACs(0.5), "ranking": "global"}, "expected a Ranking"),
    ({"budget": MACs(0.5), "regularizer": "lasso"}, "expected a SparsityRegularizer"),
    ({"budget": MACs(0.5), "widths": 8}, "expected a Widths"),
    ({"budget": MACs(0.5), "heads": "both"}, "'dim'.*'head'"),
    ({"budget": MACs(0.5), "every_n_steps": 0}, "expected an integer >= 1"),
    ({"budget": MACs(0.5), "calibration_batches": 0}, "expected an integer >= 1"),
    ({"remaining": {"conv": 0.0}}, "remaining"),
    ({"remaining": {"conv": 40}}, "remaining"),
]


@pytest.mark.parametrize(("arguments", "sentence"), WRONG, ids=lambda value: str(value)[:50])
def test_wrong_argument_is_one_sentence_at_construction(arguments, sentence) -> None:
    with pytest.raises((ValueError, TypeError), match=sentence) as caught:
        StructuredPruning(**arguments)
    assert str(caught.value).startswith("`StructuredPruning(")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Widths(round_to=0), "expected an integer >= 1"),
        (lambda: Widths(round_to=2.5), "expected an integer"),
        (lambda: Widths(min_remaining=1.5), "min_remaining"),
        (lambda: Global(reduction="median"), "'median'"),
        (lambda: Global(normalizer="softmax"), "'softmax'"),
        (lambda: GroupLasso(strength="strong"), "expected a number"),
        (lambda: GrowingRegularization(growth=-1.0), "expected a number >= 0"),
        (lambda: prune_channels(nn.Linear(2, 2), torch.zeros(1, 2)), "expected a budget or `remaining`"),
        (lambda: prune_channels(nn.Linear(2, 2), torch.zeros(1, 2), Sparsity(0.5)), "WeightPruning"),
        (lambda: prune_channels(nn.Linear(2, 2), torch.zeros(1, 2), MACs(0.5), criterion="l1"), "a Criterion"),
        (lambda: prune_channels(nn.Linear(2, 2), None, MACs(0.5)), "example_inputs=None"),
    ],
)
def test_wrong_value_is_one_sentence(make, sentence) -> None:
    with pytest.raises((ValueError, TypeError), match=sentence):
        make()
