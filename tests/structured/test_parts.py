"""Events, evidence, sparsity learning, batch-norm re-estimation, and what is refused."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_light.budgets import MACs, Sparsity
from lightning_light.criteria import Activation, Hessian, Taylor
from lightning_light.dependency import trace_dependencies
from lightning_light.errors import BudgetError, TargetError, UnsupportedError
from lightning_light.events import event_points, points_done
from lightning_light.schedules import Constant, Cubic, Linear, OneShot, Staircase, Window
from lightning_light.structured import GroupLasso, GrowingRegularization, StructuredPruning, batch_norm
from lightning_light.structured.gather import ActivationWatch, add_gradients, mean_evidence
from lightning_light.structured.regularization import add_penalty, group_norms
from tests.contract.bodies import Body, module_class
from tests.contract.runs import DEFAULT_HOST, module_of, shapes, trainer
from tests.zoo import ZOO, noise


def lit() -> Any:
    return module_class(Body, DEFAULT_HOST)()


# Events.


@pytest.mark.parametrize("schedule", [Linear(), Cubic(), Window(Cubic(), start=0.2, end=0.8), Staircase(Linear(), 4)])
def test_events_rise_and_end_at_the_whole(schedule) -> None:
    points = event_points(schedule, events=5)
    assert [share for _, share in points] == sorted({share for _, share in points})
    assert points[-1][1] == 1.0
    assert all(schedule(progress) == share for progress, share in points)
    assert len(points) <= 5


def test_one_shot_and_constant_act_once() -> None:
    assert event_points(OneShot(at=0.5), events=10) == [(0.5, 1.0)]
    assert event_points(Constant(1.0), events=10) == [(0.0, 1.0)]


def test_the_last_step_is_the_end_of_the_run() -> None:
    points = [(0.0, 0.1), (0.5, 0.5), (1.0, 1.0)]
    assert [points_done(points, step / 10, 10) for step in range(10)] == [1, 1, 1, 1, 1, 2, 2, 2, 2, 3]


# Evidence.


def test_gradients_are_means_over_steps() -> None:
    torch.manual_seed(0)
    model, sums, gradients = nn.Linear(3, 2), {}, []

    class Both(Taylor):
        needs = frozenset({"grad", "grad_squared"})

    for seed in range(4):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append(model.weight.grad.clone())
        add_gradients(sums, model, Both(), model.parameters())
    found = mean_evidence(sums)
    stacked = torch.stack(gradients)
    torch.testing.assert_close(found.grad["weight"], stacked.mean(0))
    torch.testing.assert_close(found.grad_squared["weight"], stacked.square().mean(0))


def test_only_what_the_criterion_needs_is_kept() -> None:
    model = nn.Linear(3, 2)
    model(torch.randn(4, 3)).sum().backward()
    sums: Any = {}
    add_gradients(sums, model, Hessian(), [model.weight])
    assert list(sums) == ["grad_squared"]
    assert [name for name in sums["grad_squared"] if not name.startswith("#")] == ["weight"]


def test_activations_are_means_over_all_but_the_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.Linear(16, 6))
    watch, sums = ActivationWatch(model), {}
    outputs: dict[str, list[Any]] = {"0": [], "2": []}
    for seed in range(3):
        x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
        outputs["0"].append(model[0](x).abs().mean((0, 2, 3)))
        outputs["2"].append(model[2](model[0](x).flatten(2)).abs().mean((0, 1)))
        watch.forget()  # what the lines above made it see
        model(x)
        watch.move_to(sums, lambda tensor: tensor)
    model.eval()(x)
    watch.move_to(sums, lambda tensor: tensor)
    watch.remove()
    found = mean_evidence(sums)
    for name, values in outputs.items():
        torch.testing.assert_close(found.activation[name], torch.stack(values).mean(0).detach())
    assert not model[0]._forward_hooks


@pytest.mark.parametrize("criterion", [Taylor(), Hessian(), Activation()], ids=repr)
def test_evidence_of_the_steps_before_a_cut_decides(criterion, tmp_path) -> None:
    """Of three steps, and no more."""
    module = lit()
    seen: list[Any] = []

    class Spy(StructuredPruning):
        def _decide(self, trainer: Any, pl_module: Any, *rest: Any) -> Any:
            state = self.state(pl_module)["gathered"]
            seen.append({kind: dict(values) for kind, values in state.items()})
            return super()._decide(trainer, pl_module, *rest)

    spy = Spy(amounts={"features.conv1": 0.5}, criterion=criterion, schedule=OneShot(at=0.5), calibration_batches=3)
    trainer(spy).fit(module)
    assert len(seen) == 1
    kind = next(iter(criterion.needs))
    key = "features.conv1.weight" if kind != "activation" else "features.conv1"
    assert float(seen[0][kind][f"#{key}"]) == 3.0
    assert module.features.conv1.out_channels == 8


# Sparsity learning.


def prepared() -> tuple[Any, Any]:
    torch.manual_seed(0)
    net = ZOO["plain"]()
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return net, [g for g in trace_dependencies(net, (noise(2, 3, 8, 8),)).groups if g.reason is None]


def norms_by_hand(net: Any) -> Any:
    squares = net.conv1.weight.square().sum((1, 2, 3)) + net.conv2.weight.square().sum((0, 2, 3))
    return (squares + net.bn1.weight.square()).sqrt().detach()


def test_the_norm_of_a_channel_counts_all_coupled_layers() -> None:
    net, groups = prepared()
    group = next(g for g in groups if g.name == "conv1")
    torch.testing.assert_close(group_norms(dict(net.named_parameters()), group), norms_by_hand(net))


def test_group_lasso_is_its_formula() -> None:
    net, groups = prepared()
    norms = norms_by_hand(net)
    add_penalty(net, groups, GroupLasso(0.1, alpha=4.0), progress=0.3)
    factor = 0.1 * 2.0 ** (4.0 * (norms.max() - norms) / (norms.max() - norms.min()))
    torch.testing.assert_close(
        net.conv1.weight.grad, factor.reshape(-1, 1, 1, 1) * net.conv1.weight, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(net.bn1.weight.grad, factor * net.bn1.weight, rtol=1e-4, atol=1e-5)
    assert net.fc.bias.grad.eq(0).all(), "the output is not pushed"


def test_growing_regularization_is_its_formula() -> None:
    net, groups = prepared()
    squares = norms_by_hand(net).square()
    add_penalty(net, groups, GrowingRegularization(0.1, growth=10.0), progress=0.25)
    factor = 0.1 * (1 + 10.0 * 0.25 * (squares.max() - squares) / (squares.max() - squares.min()))
    torch.testing.assert_close(net.conv1.weight.grad, factor.reshape(-1, 1, 1, 1) * net.conv1.weight)


def test_parameters_without_a_gradient_are_left_alone() -> None:
    net, groups = prepared()
    net.conv1.weight.grad = None
    add_penalty(net, groups, GroupLasso(0.1), progress=0.0)
    assert net.conv1.weight.grad is None


# Batch-norm re-estimation.


def test_statistics_are_means_of_the_batches_to_come() -> None:
    layer = nn.Sequential(nn.BatchNorm1d(3, momentum=0.3), nn.BatchNorm1d(3, track_running_stats=False))
    batches = [torch.randn(8, 3) * 3 + 1 for _ in range(4)]
    layer(batches[0] + 100)
    momenta = batch_norm.begin(layer)
    for batch in batches:
        layer[0](batch)
    batch_norm.restore(layer, momenta)
    torch.testing.assert_close(layer[0].running_mean, torch.stack([batch.mean(0) for batch in batches]).mean(0))
    torch.testing.assert_close(layer[0].running_var, torch.stack([batch.var(0) for batch in batches]).mean(0))
    assert layer[0].momentum == 0.3
    assert momenta == {"0": 0.3}


def test_momentum_is_back_after_the_run() -> None:
    module = lit()
    pruning = StructuredPruning(MACs(0.5), schedule=OneShot(at=0.3), reestimate_batch_norm=3)
    trainer(pruning).fit(module)
    assert [layer.momentum for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)] == [0.1] * 3


def test_momentum_is_back_also_when_the_run_ends_early() -> None:
    module = lit()
    pruning = StructuredPruning(MACs(0.5), schedule=OneShot(at=0.9), reestimate_batch_norm=50)
    trainer(pruning).fit(module)
    assert [layer.momentum for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)] == [0.1] * 3


# In a Trainer.


def test_a_dry_run_trains_as_without_it() -> None:
    plain, watched = lit(), lit()
    trainer().fit(plain)
    trainer(StructuredPruning(MACs(0.5), dry_run=True)).fit(watched)
    assert plain.losses == watched.losses
    assert shapes(plain) == shapes(watched)


def test_out_of_reach_is_said_before_anything_is_cut() -> None:
    module = lit()
    with pytest.raises(BudgetError, match="is out of reach"):
        trainer(StructuredPruning(MACs(0.001), schedule=OneShot())).fit(module)
    assert shapes(module) == shapes(lit())


def test_targets_and_amounts_that_name_nothing_are_said_before_the_first_batch() -> None:
    for options in ({"targets": "backbone.*"}, {"amounts": {"backbone": 0.5}}):
        module = lit()
        with pytest.raises(TargetError, match="backbone"):
            trainer(StructuredPruning(MACs(0.5), **options)).fit(module)
        assert not module.losses


def test_masked_and_quantized_layers_are_refused() -> None:
    masked = lit()
    nn.utils.prune.l1_unstructured(masked.features.conv1, "weight", 0.3)
    with pytest.raises(UnsupportedError, match=r"`features.conv1` has a mask .*prune.remove"):
        trainer(StructuredPruning(MACs(0.5))).fit(masked)
    quantized = lit()
    quantized.features.conv1.weight_fake_quant = nn.Identity()
    with pytest.raises(UnsupportedError, match=r"`features.conv1` is prepared for quantization"):
        trainer(StructuredPruning(MACs(0.5))).fit(quantized)


def test_lbfgs_is_refused_before_the_first_batch() -> None:
    class Second(Body):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())  # type: ignore[attr-defined]

    module = module_class(Second, DEFAULT_HOST)()
    with pytest.raises(UnsupportedError, match="LBFGS"):
        trainer(StructuredPruning(MACs(0.5))).fit(module)
    assert not module.losses


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "expected a budget or `amounts`"),
    ({"budget": 0.4}, "expected a budget, found float"),
    ({"budget": Sparsity(0.5)}, "expected MACs, Params, Channels, Size or Latency"),
    ({"budget": MACs(0.5), "heads": "both"}, "expected 'dim' .* or 'head'"),
    ({"budget": MACs(0.5), "max_amount": 0.0}, "expected 0 < max_amount <= 1"),
    ({"budget": MACs(0.5), "max_amount": 1.5}, "expected 0 < max_amount <= 1"),
    ({"budget": MACs(0.5), "round_to": 0}, "expected an integer >= 1"),
    ({"budget": MACs(0.5), "round_to": 2.5}, "expected an integer >= 1"),
    ({"budget": MACs(0.5), "min_channels": 0}, "expected an integer >= 1"),
    ({"budget": MACs(0.5), "events": 0}, "expected an integer >= 1"),
    ({"budget": MACs(0.5), "calibration_batches": 0}, "expected an integer >= 1"),
    ({"budget": MACs(0.5), "reestimate_batch_norm": -1}, "expected an integer >= 0"),
    ({"amounts": {"conv": 1.0}}, "expected 0 <= amount < 1"),
    ({"amounts": {"conv": 40}}, "never percent"),
    ({"budget": MACs(0.5), "reduction": "median"}, "median"),
    ({"budget": MACs(0.5), "normalizer": "softmax"}, "softmax"),
]


@pytest.mark.parametrize(("arguments", "sentence"), WRONG, ids=lambda value: str(value)[:50])
def test_a_wrong_argument_is_one_sentence(arguments, sentence) -> None:
    with pytest.raises((ValueError, TypeError), match=sentence) as caught:
        StructuredPruning(**arguments)
    assert "StructuredPruning(" in str(caught.value)


@pytest.mark.parametrize("kind", [GroupLasso, GrowingRegularization])
def test_a_negative_strength_is_refused(kind) -> None:
    with pytest.raises(ValueError, match=r"strength=-1.* expected a number >= 0"):
        kind(strength=-1.0)


def test_a_module_that_is_never_called_is_said() -> None:
    class Direct(Body):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self.head(self.features(batch[0])), batch[1])

    with pytest.warns(UserWarning, match="was never called"):
        trainer(StructuredPruning(MACs(0.5))).fit(module_class(Direct, DEFAULT_HOST)())
    module = module_class(Direct, DEFAULT_HOST)()
    module.example_input_array = noise(2, 3, 8, 8)
    trainer(StructuredPruning(MACs(0.5))).fit(module)
    assert shapes(module) != shapes(module_of_body())


def module_of_body() -> Any:
    from tests.contract.case import Case

    return module_of(Case("plain", lambda folder: []))
