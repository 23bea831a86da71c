"""`substitute_operators` and `Substitution`: the best choice for the budget, what is left alone, what is refused."""

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lightning_light as ll
from lightning_light.budgets import Budget
from lightning_light.example_input import ExampleInput
from lightning_light.isolation import isolated
from lightning_light.substitution import (
    DepthwiseSeparable,
    Fire,
    Ghost,
    GroupShuffle,
    InvertedResidual,
    Operator,
    Substitution,
    substitute_operators,
)
from lightning_light.substitution.fitting import fit_operator
from lightning_light.validation import validated
from tests.contract.bodies import Body
from tests.contract.runs import module_class, trainer
from tests.zoo import noise


class Net(nn.Module):
    """Three convolutions that can be replaced, and all kinds that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.b, self.c = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.point, self.grouped = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.up = nn.ConvTranspose2d(12, 12, 3, padding=1)
        self.twice = nn.Conv2d(12, 12, 3, padding=1)
        self.tied, self.owner = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.owner.weight = self.tied.weight
        self.frozen = nn.Conv2d(12, 12, 3, padding=1).requires_grad_(False)
        self.hooked, self.bare = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.hooked.register_forward_hook(lambda module, args, output: output + 1)
        self.normed = parametrizations.weight_norm(nn.Conv2d(12, 12, 3, padding=1))
        self.circular = nn.Conv2d(12, 12, 3, padding=1, padding_mode="circular")
        self.read = nn.Conv2d(12, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(F.relu(self.b(F.relu(self.bn(self.a(x))))))
        x = self.twice(self.twice(self.up(self.grouped(self.point(x)))))
        x = self.normed(self.hooked(self.frozen(self.owner(self.tied(x)))))
        x = self.circular(F.conv2d(x, self.bare.weight, self.bare.bias, padding=1))
        return (self.read(x) + self.read.weight.mean()).mean((2, 3))


REASONS = {
    "point": "a 1x1 convolution",
    "grouped": "it has 3 groups",
    "up": "a ConvTranspose2d",
    "twice": "called 2 times",
    "tied": "its weight is shared with owner.weight",
    "owner": "its weight is shared with tied.weight",
    "frozen": "it is frozen",
    "hooked": "it has forward hooks",
    "bare": "not called",
    "normed": "computed by a parametrization",
    "circular": "padding_mode='circular'",
    "read": "does not run with a replacement",
}
OPERATORS = [DepthwiseSeparable(), GroupShuffle(2), Ghost(2), Fire(0.5)]


def make(kind: type[nn.Module] = Net) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind().eval()


@contextmanager
def unchanged(net: nn.Module) -> Iterator[None]:
    before, state, random = repr(net), {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    yield
    assert repr(net) == before
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_the_choice_is_the_best_of_all_for_the_budget_and_others_are_left_alone_with_a_reason() -> None:
    net, x = make(), noise(8, 4, 8, 8)
    with unchanged(net):
        planned = substitute_operators(net, x, ll.MACs(0.88), operators=OPERATORS, fit_steps=3, dry_run=True)
    assert {name: REASONS[name] in reason for name, reason in planned.skipped.items()} == dict.fromkeys(REASONS, True)
    rows = {layer: [row for row in planned.table if row.layer == layer] for layer in "abc"}
    assert {row.layer for row in planned.table} == set("abc")
    choices = itertools.product(*([None, *rows[layer]] for layer in "abc"))
    taken = [[row for row in choice if row is not None] for choice in choices]
    within = [rows for rows in taken if planned.before + sum(row.cost for row in rows) <= 0.88 * planned.before]
    best = min(within, key=lambda rows: sum(row.score for row in rows))
    assert planned.operators == {row.layer: row.operator for row in best}
    table = "\n".join(planned.lines())
    assert table.count("chosen") == len(best)
    assert "up: left alone (a ConvTranspose2d" in table

    with torch.no_grad():
        before = net(x)
    plan = substitute_operators(net, x, ll.MACs(0.88), operators=OPERATORS, fit_steps=3)
    assert plan.operators == planned.operators
    assert ll.MACs(1.0).measure(net, ExampleInput.of(x)) == plan.after
    assert plan.after == planned.before + sum(row.cost for row in best)
    with torch.no_grad():
        assert (net(x) - before).square().mean() / before.var() < 1.0


def test_scores_are_the_distances_of_the_outputs_with_one_layer_replaced() -> None:
    net, x = make(), noise(8, 4, 8, 8)
    plan = substitute_operators(net, x, ll.Params(0.985), operators=[Ghost(2)], targets="b", fit_steps=0)
    reference = make()
    with isolated(reference):
        y = reference(x)
        reference.b = plan.layers["b"]
        expected = (reference(x) - y).square().mean() / y.var(correction=0)
    assert plan.table[0].score == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("budget", [ll.MACs(0.2), ll.Size("1 kB"), ll.Latency("1 ns")])
def test_a_budget_out_of_reach_is_refused_with_the_reachable_value(budget: Budget) -> None:
    net, x = make(), noise(8, 4, 8, 8)
    with unchanged(net), pytest.raises(ll.BudgetError, match=r"found -?[\d.e+-]+") as caught:
        substitute_operators(net, x, budget, operators=OPERATORS)
    if isinstance(budget, ll.MACs):
        assert "grouped: it has 3 groups" in str(caught.value)
        least = float(str(caught.value).split("found ")[1].split()[0])
        reachable = ll.MACs(1.001 * least / budget.measure(net, ExampleInput.of(x)))
        reached = substitute_operators(net, x, reachable, operators=OPERATORS)
        assert reached.after == pytest.approx(least, rel=1e-3)


@dataclass(frozen=True)
class Sublinear(Budget):
    """A quantity of which replaced layers together save less than the sum of what each of them saves."""

    quantity = "units"

    def goal(self, dense: float) -> float:
        return 0.74 * dense

    def measure(self, model: nn.Module, example: Any) -> float:
        replaced = sum(isinstance(getattr(model, name, None), nn.Sequential) for name in "abc")
        alone = isinstance(model, nn.Sequential)
        return 100.0 - 15.0 * replaced + (5.0 if replaced > 1 else 0.0) - 15.0 * alone


def test_a_quantity_that_is_not_the_sum_of_the_layers_is_met_as_measured() -> None:
    net, x = make(), noise(8, 4, 8, 8)
    plan = substitute_operators(net, x, Sublinear(), operators=[DepthwiseSeparable()], fit_steps=0)
    assert len(plan.operators) == 3  # two were enough if savings were additive, but leave 75
    assert plan.after == 60.0


@validated
@dataclass(frozen=True)
class Smaller(Operator):
    """A kernel of another size; with ``cropped`` its outputs have another shape."""

    cropped: bool = False

    def build(self, conv: nn.Conv2d) -> nn.Module:
        return nn.Conv2d(conv.in_channels, conv.out_channels, 1, conv.stride, padding=-1 if self.cropped else 0)


def test_an_operator_of_a_user_is_fitted_and_one_of_another_shape_is_named() -> None:
    net, x = make(), noise(8, 4, 8, 8)
    plan = substitute_operators(net, x, ll.MACs(0.8), operators=[Smaller(), Smaller(cropped=True)], fit_steps=5)
    assert set(plan.operators.values()) == {Smaller()}
    assert {row.operator for row in plan.table} == {Smaller()}
    with pytest.raises(ll.BudgetError, match=r"b: Smaller\(cropped=True\): it"):
        substitute_operators(make(), x, ll.MACs(0.8), operators=[Smaller(cropped=True)])


class Small(Body):
    """With biases in a parameter group without weight decay."""

    def configure_optimizers(self) -> Any:
        biases = [p for name, p in self.named_parameters() if name.endswith("bias")]
        others = [p for name, p in self.named_parameters() if not name.endswith("bias")]
        return torch.optim.SGD([{"params": others, "weight_decay": 0.01}, {"params": biases}], lr=0.05, momentum=0.9)


def test_new_parameters_join_the_groups_of_the_old_ones_and_a_checkpoint_has_the_operators(tmp_path: Path) -> None:
    module = module_class(Small, L)()
    callback = Substitution(ll.MACs(0.8), operators=[Smaller(), Ghost(2)], start=0.4, fit_steps=2)
    run = trainer(callback)
    run.fit(module)
    layers = callback.state(module)["layers"]
    assert layers
    group_of = {id(p): place for place, group in enumerate(run.optimizers[0].param_groups) for p in group["params"]}
    found = {name: group_of.pop(id(parameter)) for name, parameter in module.named_parameters()}
    assert not group_of
    assert found["features.last.bias" if "features.last" not in layers else "head.bias"] == 1
    norms = ("head.bias", "features.bn0.bias", "features.bn1.bias", "features.bn2.bias")
    for name, group in found.items():
        own_bias = name.startswith("features.last.") and name.endswith("bias")
        assert group == int(name in norms or own_bias)
    run.save_checkpoint(tmp_path / "small.ckpt")
    loaded = ll.load_from_checkpoint(module_class(Small, L), tmp_path / "small.ckpt").eval()
    assert torch.equal(loaded(noise(2, 3, 8, 8)), module.eval()(noise(2, 3, 8, 8)))


def test_a_dry_run_prints_layers_operators_costs_and_scores_and_changes_nothing(caplog) -> None:
    module = module_class(Body, L)()
    before = repr(module)
    with caplog.at_level(logging.INFO):
        trainer(Substitution(ll.MACs(0.7), operators=OPERATORS, start=0.4, fit_steps=0, dry_run=True)).fit(module)
    assert repr(module) == before
    (text,) = [record.getMessage() for record in caplog.records if "dry run" in record.getMessage()]
    assert "layer" in text
    assert "macs saved" in text
    assert "features.conv1" in text
    assert "DepthwiseSeparable(multiplier=1)" in text
    assert "chosen" in text


def test_layers_that_a_later_method_owns_are_refused() -> None:
    net, x = make(), noise(8, 4, 8, 8)
    ll.quantize(net, x, ll.Int8())
    with unchanged(net), pytest.raises(ll.errors.UnsupportedError, match="expected a layer that no other method"):
        substitute_operators(net, x, ll.MACs(0.88), operators=OPERATORS)


def test_no_operators_and_other_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`operators=\(\)`: expected at least one operator"):
        Substitution(ll.MACs(0.5), operators=[])
    with pytest.raises(ValueError, match=r"Sparsity.*expected a budget that lighter operators can reach"):
        Substitution(ll.Sparsity(0.5))
    for wrong in (lambda: GroupShuffle(1), lambda: Ghost(1), lambda: Ghost(2, kernel_size=2), lambda: Fire(0.0)):
        with pytest.raises(ValueError, match="expected"):
            wrong()


def test_branches_are_merged_when_the_substitution_begins_and_their_layers_are_replaced() -> None:
    module = module_class(Body, L)()
    expansion = ll.Reparameterization(ll.reparameterization.ACB())
    callback = Substitution(ll.MACs(0.7), operators=OPERATORS, start=0.4, fit_steps=0)
    trainer(expansion, callback).fit(module)
    expanded, replaced = expansion.state(module)["layers"], callback.state(module)["layers"]
    assert set(replaced) <= set(expanded)
    assert replaced
    assert not any(isinstance(layer, ll.reparameterization.apply.BranchedLayer) for layer in module.modules())


@dataclass(frozen=True)
class Nothing(Operator):
    """An operator of a user that forgets to return its layers."""

    def build(self, conv: nn.Conv2d) -> nn.Module:
        return None  # type: ignore[return-value]


def test_layers_and_data_that_cannot_be_used_are_named() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(*(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))), noise(4, 4, 9, 9)
    options: dict[str, Any] = {"fit_steps": 0, "progress_bar": False}
    plan = substitute_operators(net, x, ll.MACs(0.9), operators=[Nothing(), Ghost(2)], targets=["0", "2"], **options)
    assert set(plan.operators.values()) == {Ghost(2)}
    with pytest.raises(ll.BudgetError, match=r"3: Nothing.*: `build` returned NoneType, not a module"):
        substitute_operators(net, x, ll.MACs(0.5), operators=[Nothing()], targets="3", **options)
    with pytest.raises(ValueError, match="expected finite outputs, found infinite ones or NaN"):
        substitute_operators(net, torch.inf * x, ll.MACs(0.5), **options)
    with pytest.raises(ValueError, match="expected inputs to calibrate on, found no batch"):
        substitute_operators(net, x, ll.MACs(0.5), data=iter([]), **options)
    nn.init.constant_(net[3].weight, torch.inf)
    assert substitute_operators(net, x, ll.MACs(1.0), **options).skipped["3"] == "its weight is not finite"


@pytest.mark.parametrize("operator", [*OPERATORS, InvertedResidual()], ids=repr)
def test_operators_start_behind_dead_channels(operator: Operator) -> None:
    conv, x = nn.Conv2d(8, 8, 3, padding=1), torch.zeros(2, 8, 6, 6)
    layers, _ = fit_operator(operator, conv, [x], [conv(x).detach()], 0)
    assert torch.allclose(layers(x), conv(x), atol=1e-3)
