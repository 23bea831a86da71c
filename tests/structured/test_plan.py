"""Plans: budgets within one channel, bounds on widths, rankings; the model is only read."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from hypothesis import given, settings, strategies as st
from torch import nn

from lightning_light.budgets import Budget, Channels, Latency, MACs, Params, Size
from lightning_light.criteria import (
    SNIP,
    Activation,
    BatchNormScale,
    Hessian,
    LearnedGates,
    Magnitude,
    Movement,
    Random,
    SoftMovement,
    Taylor,
    Wanda,
)
from lightning_light.criteria.torch_pruning import FromTorchPruning
from lightning_light.dependency import trace_dependencies
from lightning_light.errors import BudgetError, TargetError, UnsupportedError
from lightning_light.example_input import ExampleInput
from lightning_light.measure.cost import count_cost
from lightning_light.quantization import LSQ, Int8, quantize
from lightning_light.structured import Global, Isomorphic, Local, Ranking, Sensitivity, Widths, prune_channels
from lightning_light.structured.ranking import removal_order
from lightning_light.structured.sensitivity import curve_lines
from lightning_light.surgery.edit import cut
from lightning_light.targets import Targets
from tests.zoo import ZOO, Net, noise

RANKINGS = [Local(), Global(), Isomorphic()]


def built(name: str = "residual") -> Net:
    torch.manual_seed(0)
    return ZOO[name]()


def pruned(net: Net, budget: Budget | None = None, **options: Any) -> Any:
    args, kwargs = net.example
    return prune_channels(net, ExampleInput(args, kwargs), budget, **options)


def cost(net: Net, budget: Budget) -> float:
    args, kwargs = net.example
    if isinstance(budget, MACs):
        return count_cost(net, args, kwargs).macs / 2  # the example has two samples
    if isinstance(budget, Params):
        return float(sum(parameter.numel() for parameter in net.parameters()))
    return float(sum(t.numel() * t.element_size() for t in [*net.parameters(), *net.buffers()]))


def widths(net: Net) -> dict[str, int]:
    args, kwargs = net.example
    return {g.name: g.width for g in trace_dependencies(net, args, kwargs).groups if g.reason is None}


@pytest.mark.parametrize("ranking", RANKINGS, ids=repr)
@pytest.mark.parametrize("name", ["concat", "depthwise", "fused_qkv", "residual"])
@pytest.mark.parametrize("budget", [MACs(0.6), Params(0.6)], ids=repr)
def test_budget_is_met_and_counted(name, ranking, budget) -> None:
    net = built(name)
    dense = cost(net, budget)
    plan = pruned(net, budget, ranking=ranking)
    assert plan.before == dense
    assert plan.after == cost(net, budget), "counted, not estimated"
    assert plan.after <= budget.goal(dense) * (1 + 1e-9)


@pytest.mark.parametrize("budget", [MACs(0.5), Params(0.5), Channels(0.5)], ids=repr)
def test_no_more_channels_are_removed_than_needed(budget) -> None:
    net = built("plain")
    before = copy.deepcopy(net)
    plan = pruned(net, budget, ranking=Global())
    args, kwargs = before.example
    graph = trace_dependencies(before, args, kwargs)
    values = []
    for name, mask in plan.kept.items():
        for channel in (~mask).nonzero().reshape(-1).tolist():
            kept, larger = {**plan.kept, name: mask.clone()}, copy.deepcopy(before)
            kept[name][channel] = True
            cut(larger, graph.kept_positions(kept), attributes=graph.attributes(larger, kept))
            values.append(float(sum(widths(larger).values())) if isinstance(budget, Channels) else cost(larger, budget))
    assert plan.after <= budget.goal(plan.before) < max(values), "with any one channel more it is not met"


def test_an_expensive_last_channel_is_kept_where_a_cheaper_one_is_enough() -> None:
    """A hidden channel of the first layer has 1,101 parameters, one of the second layer 102."""
    net = nn.Sequential(nn.Linear(1000, 8), nn.ReLU(), nn.Linear(8, 100), nn.ReLU(), nn.Linear(100, 93))
    with torch.no_grad():
        for layer, scales in ((net[0], [5.5, *[100.0] * 7]), (net[2], [float(i) for i in range(100)])):
            layer.weight.copy_(torch.tensor(scales)[:, None] / layer.weight.shape[1] ** 0.5)
    ranking = Global(reduction="first", normalizer=None)
    total = sum(parameter.numel() for parameter in net.parameters())
    plan = prune_channels(net, torch.zeros(2, 1000), Params((total - 600) / total), ranking=ranking, dry_run=True)
    assert (~plan.kept["2"]).nonzero().flatten().tolist() == list(range(6)), "six channels, 612 parameters"
    assert plan.kept["0"].all(), "by scores it comes before the sixth"
    plan = prune_channels(net, torch.zeros(2, 1000), Params((total - 1700) / total), ranking=ranking, dry_run=True)
    assert not plan.kept["0"][0], "where no few cheap ones are enough, it is removed"


def test_two_expensive_channels_in_a_row_are_kept_where_a_cheaper_one_is_enough() -> None:
    """A channel of the three hidden layers has 1,101, 17 and 194 parameters; 100 parameters have to go."""
    layers = [nn.Linear(1000, 8), nn.Linear(8, 100), nn.Linear(100, 8)]
    scales = [[4.6, *[100.0] * 7], [float(i) for i in range(100)], [4.5, *[100.0] * 7]]
    with torch.no_grad():
        for layer, values in zip(layers, scales, strict=True):
            layer.weight.copy_(torch.tensor(values)[:, None] / layer.weight.shape[1] ** 0.5)
    net = nn.Sequential(*layers, nn.Linear(8, 93))
    total = sum(parameter.numel() for parameter in net.parameters())
    ranking = Global(reduction="first", normalizer=None)
    plan = prune_channels(net, torch.zeros(2, 1000), Params((total - 100) / total), ranking=ranking, dry_run=True)
    removed = {name: (~mask).nonzero().flatten().tolist() for name, mask in plan.kept.items()}
    assert removed == {"0": [], "1": [0, 1, 2, 3, 4, 5], "2": []}, "six channels, 102 parameters"


def test_size_counts_bytes_of_tensors() -> None:
    net = built("plain")
    plan = pruned(net, Size(3_000))
    assert plan.after == cost(net, Size(3_000)) <= 3_000


def test_latency_is_measured() -> None:
    net = built("plain")
    plan = pruned(net, Latency(1.0))
    assert plan.removed == 0, "the network meets one second as it is"
    with pytest.raises(BudgetError, match="Latency"):
        pruned(net, Latency(1e-9))


@given(remaining=st.floats(0.3, 1.0), seed=st.integers(0, 1000))
@settings(max_examples=5, deadline=None)
def test_channels_budget_is_met_within_one_channel(remaining, seed) -> None:
    net = built("plain")
    total = sum(widths(net).values())
    pruned(net, Channels(remaining), criterion=Random(seed))
    left = sum(widths(net).values())
    assert left <= remaining * total + 1e-6
    assert left > remaining * total - 1, "within one channel"


@pytest.mark.parametrize("ranking", RANKINGS, ids=repr)
def test_smallest_widths_are_respected(ranking) -> None:
    net = built("plain")
    pruned(net, Channels(0.7), ranking=ranking, widths=Widths(min_channels=6, min_remaining=0.6))
    assert net.conv1.out_channels >= 6
    assert net.conv2.out_channels >= 8, "60 % of twelve, rounded up"


@pytest.mark.parametrize("step", [2, 4])
def test_widths_are_multiples_of_round_to(step) -> None:
    net = built("plain")
    plan = pruned(net, MACs(0.6), widths=Widths(round_to=step))
    assert plan.removed
    assert net.conv1.out_channels % step == net.conv2.out_channels % step == 0


def test_remaining_sets_the_width_of_a_layer() -> None:
    net = built("plain")
    plan = pruned(net, remaining={"conv*": 0.75, "conv2": 0.5})
    assert (net.conv1.out_channels, net.conv2.out_channels) == (6, 6), "later patterns win"
    assert plan.removed == 8


def test_remaining_and_a_budget_together() -> None:
    net = built("plain")
    plan = pruned(net, MACs(0.5), remaining={"conv1": 0.75})
    assert net.conv1.out_channels == 6
    assert plan.after <= 0.5 * plan.before


def test_only_targets_lose_channels() -> None:
    net = built("plain")
    plan = pruned(net, MACs(0.8), targets="conv2")
    assert net.conv1.out_channels == 8
    assert net.conv2.out_channels < 12
    assert "`targets` exclude conv1" in plan.skipped["conv1"]
    assert plan.skipped["fc"] == "produces the model output"
    with pytest.raises(TargetError):
        pruned(built("plain"), MACs(0.8), targets="nothing")
    with pytest.raises(TargetError):
        pruned(built("plain"), remaining={"nothing": 0.5})


def test_coupled_layers_are_pruned_together() -> None:
    net = built("residual")
    plan = pruned(net, MACs(0.9), targets=Targets(exclude=("stem",)))
    assert net.stem.out_channels == net.conv1.out_channels == 8
    assert any("`targets` exclude stem" in reason for reason in plan.skipped.values())


def test_lowest_scores_are_removed_first() -> None:
    net = built("batch_norm_free")
    with torch.no_grad():
        for layer in (net.conv1, net.conv2):
            layer.weight.copy_(torch.arange(1, len(layer.weight) + 1).reshape(-1, 1, 1, 1).expand_as(layer.weight))
    plan = pruned(net, remaining={"conv1": 0.5, "conv2": 0.5}, criterion=Magnitude(), ranking=Global(reduction="first"))
    assert plan.kept["conv1"].tolist() == [False] * 4 + [True] * 4
    assert plan.kept["conv2"].tolist() == [False] * 6 + [True] * 6


def test_local_removes_the_same_fraction_everywhere_and_global_the_least_important_channels() -> None:
    nets = []
    for ranking in (Local("first", None), Global("first", None)):
        net = built("batch_norm_free")
        with torch.no_grad():
            net.conv1.weight.mul_(1e-3)
        pruned(net, Channels(0.5), ranking=ranking)
        nets.append((net.conv1.out_channels, net.conv2.out_channels))
    assert nets[0] == (4, 6)
    assert nets[1] == (2, 8), "the layer of small weights goes to its smallest width"


def test_removal_order_takes_the_same_fraction_of_each_scope() -> None:
    net = built("plain")
    args, kwargs = net.example
    groups = [g for g in trace_dependencies(net, args, kwargs).groups if g.reason is None]
    scores = {group.name: torch.rand(group.width) for group in groups}
    original = {group.name: group.width for group in groups}
    numbers, channels = removal_order(groups, scores, [group.name for group in groups], original)
    for count in range(1, len(numbers) + 1):
        shares = [float((numbers[:count] == i).sum()) / group.width for i, group in enumerate(groups)]
        assert max(shares) - min(shares) <= 1 / min(group.width for group in groups)
    first = channels[numbers == 0]
    assert torch.equal(first, torch.argsort(scores[groups[0].name]))


def test_isomorphic_ranks_groups_of_equal_structure_together() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Conv1d(1, 5, 1)
            self.fc = nn.Linear(11, 2)

        def forward(self, x: Any) -> Any:
            y = self.b(self.a(x).relu()).relu()
            return self.fc(torch.cat([y, self.c(x[:, None]).mean(2)], 1))

    model = Twins()
    groups = {g.name: g for g in trace_dependencies(model, (torch.randn(2, 4),)).groups if g.reason is None}
    scopes = {name: Isomorphic().scope(group, model) for name, group in groups.items()}
    assert scopes["a"] == scopes["b"] != scopes["c"]


@pytest.mark.parametrize("heads", ["dim", "head"])
@pytest.mark.parametrize("name", ["attention", "encoder", "fused_qkv"])
def test_attention_loses_positions_or_whole_heads(name, heads) -> None:
    net = built(name)
    plan = pruned(net, Params(0.7), heads=heads, widths=Widths(min_channels=1))
    assert plan.after <= 0.7 * plan.before
    args, kwargs = net.example
    assert net(*args, **kwargs).shape == (2, 5)


def test_unreachable_budget_is_refused_with_the_network_unchanged() -> None:
    net = built("plain")
    before = {name: (id(t), t.data_ptr(), t.clone()) for name, t in net.state_dict(keep_vars=True).items()}
    with pytest.raises(
        BudgetError, match=r"`MACs\(remaining=0.01\)` cannot be reached: expected macs <= .* Lower `min_channels`"
    ):
        pruned(net, MACs(0.01))
    for name, tensor in net.state_dict(keep_vars=True).items():
        identity, pointer, value = before[name]
        assert (identity, pointer) == (id(tensor), tensor.data_ptr())
        assert torch.equal(value, tensor)
    assert (net.conv1.out_channels, net.bn2.num_features) == (8, 12)


def test_dry_run_plans_and_removes_nothing() -> None:
    net = built("plain")
    plan = pruned(net, MACs(0.5), dry_run=True)
    assert plan.removed
    assert any("->" in line for line in plan.lines())
    assert net.conv1.out_channels == 8


def test_custom_ranking() -> None:
    class OnlyFirst(Ranking):
        def scope(self, group: Any, model: Any) -> str:
            return "first" if group.name == "conv1" else "rest"

    net = built("plain")
    assert pruned(net, MACs(0.6), ranking=OnlyFirst()).after <= 0.6 * cost(built("plain"), MACs(0.6))


# With data.


class Images:
    """Batches of noise with labels, as a loader gives them."""

    def __iter__(self) -> Iterator[Any]:
        for seed in range(4):
            images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
            yield images, torch.arange(8) % 5


def loss(output: Any, batch: Any) -> Any:
    return F.cross_entropy(output, batch[1])


@pytest.mark.parametrize(
    "criterion",
    [Taylor(), Hessian(), Activation(), Wanda(), Movement(), SoftMovement(), SNIP(), LearnedGates(2)],
    ids=repr,
)
def test_every_criterion_works_with_data(criterion) -> None:
    net = built("plain")
    grads = {name: parameter.grad for name, parameter in net.named_parameters()}
    plan = pruned(net, MACs(0.6), criterion=criterion, data=Images(), loss=loss)
    assert plan.removed
    assert plan.after == cost(net, MACs(0.6)) <= 0.6 * plan.before
    assert {name: parameter.grad for name, parameter in net.named_parameters()} == grads


def test_taylor_removes_the_channels_with_the_smallest_first_order_loss_change() -> None:
    net = built("batch_norm_free")
    gradients = []
    for images, labels in Images():
        net.zero_grad()
        loss(net.eval()(images), (images, labels)).backward()
        gradients.append(net.conv1.weight.grad.clone())
    net.zero_grad()
    scores = (net.conv1.weight * torch.stack(gradients).mean(0)).square().sum((1, 2, 3))
    expected = scores > scores.sort().values[3]
    plan = pruned(net, remaining={"conv1": 0.5}, criterion=Taylor(), ranking=Local("first"), data=Images(), loss=loss)
    assert torch.equal(plan.kept["conv1"], expected)


@pytest.mark.parametrize(
    "importance",
    [tp.importance.GroupMagnitudeImportance(p=1), tp.importance.LAMPImportance(), tp.importance.BNScaleImportance()],
    ids=lambda importance: type(importance).__name__,
)
def test_importance_of_torch_pruning_keeps_the_channels_that_torch_pruning_keeps(importance) -> None:
    ours, theirs = built("plain"), built("plain")
    for net in (ours, theirs):
        for layer in (net.bn1, net.bn2):
            layer.weight.data.copy_(torch.linspace(0.5, 1.5, len(layer.weight)).flip(0))
    pruned(ours, remaining={"conv*": 0.5}, criterion=FromTorchPruning(importance))
    options: dict[str, Any] = {"in_channel_groups": {}, "out_channel_groups": {}}  # its defaults are shared
    tp.pruner.BasePruner(
        theirs, theirs.example[0][0], importance, pruning_ratio=0.5, ignored_layers=[theirs.fc], **options
    ).step()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name


def test_criterion_without_its_data_is_refused() -> None:
    net = built("plain")
    with pytest.raises(ValueError, match=r"expected `data`.*\['grad'\].*data=train_dataloader"):
        pruned(net, MACs(0.5), criterion=Taylor())
    with pytest.raises(ValueError, match="expected `loss`"):
        pruned(net, MACs(0.5), criterion=Taylor(), data=Images())
    assert net.conv1.out_channels == 8


def test_batch_norm_statistics_are_moved_with_data_alone() -> None:
    moved, stale = built("plain"), built("plain")
    pruned(moved, MACs(0.6), data=Images())
    pruned(stale, MACs(0.6), data=Images(), correct_batch_norm=False)
    assert moved.conv1.out_channels == stale.conv1.out_channels
    assert not torch.equal(moved.bn2.running_mean, stale.bn2.running_mean)
    plain = built("plain")
    pruned(plain, MACs(0.6))
    assert torch.equal(plain.bn2.running_mean, stale.bn2.running_mean)


def test_criterion_that_reads_no_tensor_of_a_layer_is_refused() -> None:
    net = built("batch_norm_free")
    with pytest.raises(UnsupportedError, match=r"`criterion=BatchNormScale\(\)` on `conv1`.*Exclude the layer"):
        pruned(net, MACs(0.5), criterion=BatchNormScale())


# With other methods.


def test_budgets_of_two_cuts_count_from_the_same_network() -> None:
    net = built("plain")
    dense = cost(net, MACs(0.5))
    pruned(net, MACs(0.7))
    pruned(net, MACs(0.5))
    assert 0.4 * dense < cost(net, MACs(0.5)) <= 0.5 * dense


@pytest.mark.parametrize("recipe", [Int8(), LSQ()], ids=repr)
def test_quantized_layers_are_refused(recipe) -> None:
    net = built("plain")
    quantize(net, noise(4, 3, 8, 8), recipe)
    with pytest.raises(UnsupportedError, match="`quantization_aware_training` owns"):
        pruned(net, MACs(0.5))
    assert net.conv1.out_channels == 8


class Uneven(nn.Module):
    """The second of two parallel layers contributes a hundredth of the output; by magnitude it is the larger one."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(6, 20), nn.Linear(6, 20)
            self.one, self.other = nn.Linear(20, 4), nn.Linear(20, 4)
        with torch.no_grad():
            self.second.weight *= torch.linspace(3.0, 4.0, 20)[:, None]
            self.other.weight /= 100.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(F.relu(self.first(x))) + self.other(F.relu(self.second(x)))


def test_sensitivity_removes_channels_up_to_one_threshold_of_the_outputs() -> None:
    batches, net = [noise(16, 6), noise(16, 6) + 1.0], Uneven()
    plan = prune_channels(
        net, batches[0], Channels(0.6), ranking=Sensitivity(distance="mse", widths=19), data=batches, dry_run=True
    )
    first, second = (int(plan.kept[name].sum()) for name in ("first", "second"))
    assert first > 18 > 8 > second, "magnitude would keep the second layer"
    last = plan.curves["first"][20 - first], plan.curves["second"][20 - second]
    following = plan.curves["first"][21 - first], plan.curves["second"][21 - second]
    assert max(last) <= min(following), "one threshold over both curves"
    with torch.no_grad():
        small = copy.deepcopy(net)
        lost = torch.argsort(net.second.weight.square().sum(1))[:5]
        small.other.weight[:, lost] = 0.0
        pairs = [(small(x), net(x)) for x in batches]
    expected = torch.stack([(a - b).square().mean() / b.var(correction=0) for a, b in pairs]).mean()
    assert plan.curves["second"][5] == pytest.approx(float(expected), rel=0.2), "channels by the mean of their tensors"
    assert [line.partition(":")[0] for line in curve_lines(plan.curves)] == ["first", "second"]
    with pytest.raises(UnsupportedError, match=r"`ranking=Sensitivity\(.*expected inputs.*data=train_dataloader"):
        prune_channels(net, batches[0], Channels(0.6), ranking=Sensitivity())
