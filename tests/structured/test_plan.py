"""Plans: budgets within one channel, floors, steps of width, amounts, rankings; the model is only read."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_light.budgets import Budget, Channels, Latency, MACs, Params, Size
from lightning_light.criteria import Magnitude, Random, Taylor
from lightning_light.dependency import trace_dependencies
from lightning_light.errors import BudgetError, TargetError
from lightning_light.measure.cost import count_cost
from lightning_light.structured import Global, Isomorphic, Local, Ranking, StructuredPruning, prune_channels
from lightning_light.structured.ranking import removal_order
from lightning_light.surgery.edit import cut
from lightning_light.targets import Targets
from tests.zoo import ZOO, Net

RANKINGS = [Local(), Global(), Isomorphic()]


def built(name: str = "residual") -> Net:
    torch.manual_seed(0)
    return ZOO[name]()


def pruned(net: Net, budget: Budget | None = None, **options: Any) -> Any:
    args, kwargs = net.example
    return prune_channels(net, args, kwargs, pruning=StructuredPruning(budget, **options))


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
def test_a_budget_is_hit_and_counted(name, ranking, budget) -> None:
    net = built(name)
    dense = cost(net, budget)
    plan = pruned(net, budget, ranking=ranking)
    assert plan.before == dense
    assert plan.after == cost(net, budget), "counted, not estimated"
    assert plan.after <= budget.goal(dense) * (1 + 1e-9)


@pytest.mark.parametrize("budget", [MACs(0.5), Params(0.5), Channels(0.5)], ids=repr)
def test_one_channel_fewer_would_miss_the_budget(budget) -> None:
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
    assert plan.after <= budget.goal(plan.before) < max(values), "with the channel that left last it is not met"


def test_size_is_bytes_of_tensors() -> None:
    net = built("plain")
    plan = pruned(net, Size(3_000))
    assert plan.after == cost(net, Size(3_000)) <= 3_000


def test_latency_is_measured() -> None:
    net = built("plain")
    plan = pruned(net, Latency(1.0))
    assert plan.removed == 0, "a second is met by the network as it is"
    with pytest.raises(BudgetError, match="Latency"):
        pruned(net, Latency(1e-9))


@given(remaining=st.floats(0.3, 1.0), seed=st.integers(0, 1000))
@settings(max_examples=5, deadline=None)
def test_any_share_of_channels_remains(remaining, seed) -> None:
    net = built("plain")
    total = sum(widths(net).values())
    pruned(net, Channels(remaining), criterion=Random(seed))
    left = sum(widths(net).values())
    assert left <= remaining * total + 1e-6
    assert left > remaining * total - 1, "within one channel"


@pytest.mark.parametrize("ranking", RANKINGS, ids=repr)
def test_floors_hold(ranking) -> None:
    net = built("plain")
    pruned(net, Channels(0.7), ranking=ranking, min_channels=6, max_amount=0.4)
    assert net.conv1.out_channels >= 6
    assert net.conv2.out_channels >= 8, "60 % of twelve, rounded up"


@pytest.mark.parametrize("step", [2, 4])
def test_widths_are_multiples(step) -> None:
    net = built("plain")
    plan = pruned(net, MACs(0.6), round_to=step)
    assert plan.removed
    assert net.conv1.out_channels % step == net.conv2.out_channels % step == 0


def test_amounts_say_what_leaves_each_layer() -> None:
    net = built("plain")
    plan = pruned(net, amounts={"conv*": 0.25, "conv2": 0.5})
    assert (net.conv1.out_channels, net.conv2.out_channels) == (6, 6), "later patterns win"
    assert plan.removed == 8


def test_amounts_and_a_budget_share_the_work() -> None:
    net = built("plain")
    plan = pruned(net, MACs(0.5), amounts={"conv1": 0.25})
    assert net.conv1.out_channels == 6
    assert plan.after <= 0.5 * plan.before


def test_targets_are_the_only_layers_that_lose_channels() -> None:
    net = built("plain")
    plan = pruned(net, MACs(0.8), targets="conv2")
    assert net.conv1.out_channels == 8
    assert net.conv2.out_channels < 12
    assert "`targets` do not name conv1" in plan.skipped["conv1"]
    assert plan.skipped["fc"] == "makes the network's output"
    with pytest.raises(TargetError):
        pruned(built("plain"), MACs(0.8), targets="nothing")
    with pytest.raises(TargetError):
        pruned(built("plain"), amounts={"nothing": 0.5})


def test_coupled_layers_leave_only_together() -> None:
    net = built("residual")
    plan = pruned(net, MACs(0.9), targets=Targets(exclude=("stem",)))
    assert net.stem.out_channels == net.conv1.out_channels == 8
    assert any("do not name stem" in reason for reason in plan.skipped.values())


def test_lowest_scores_leave_first() -> None:
    net = built("batch_norm_free")
    with torch.no_grad():
        for layer in (net.conv1, net.conv2):
            layer.weight.copy_(torch.arange(1, len(layer.weight) + 1).reshape(-1, 1, 1, 1).expand_as(layer.weight))
    plan = pruned(net, amounts={"conv1": 0.5, "conv2": 0.5}, criterion=Magnitude(), reduction="first")
    assert plan.kept["conv1"].tolist() == [False] * 4 + [True] * 4
    assert plan.kept["conv2"].tolist() == [False] * 6 + [True] * 6


def test_local_takes_the_same_share_everywhere_and_global_takes_where_least_is_lost() -> None:
    nets = []
    for ranking in (Local(), Global()):
        net = built("batch_norm_free")
        with torch.no_grad():
            net.conv1.weight.mul_(1e-3)
        pruned(net, Channels(0.5), ranking=ranking, normalizer=None, reduction="first")
        nets.append((net.conv1.out_channels, net.conv2.out_channels))
    assert nets[0] == (4, 6)
    assert nets[1] == (2, 8), "the weak layer goes to its floor"


def test_removal_order_is_fair_between_scopes() -> None:
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


def test_isomorphic_compares_like_with_like() -> None:
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
def test_attention_shrinks_in_both_ways(name, heads) -> None:
    net = built(name)
    plan = pruned(net, Params(0.7), heads=heads, min_channels=1)
    assert plan.after <= 0.7 * plan.before
    args, kwargs = net.example
    assert net(*args, **kwargs).shape == (2, 5)


def test_out_of_reach_is_said_and_nothing_is_touched() -> None:
    net = built("plain")
    before = {name: (id(t), t.data_ptr(), t.clone()) for name, t in net.state_dict(keep_vars=True).items()}
    with pytest.raises(
        BudgetError, match=r"`MACs\(remaining=0.01\)` is out of reach: expected macs <= .* Lower `min_channels`"
    ):
        pruned(net, MACs(0.01))
    for name, tensor in net.state_dict(keep_vars=True).items():
        identity, pointer, value = before[name]
        assert (identity, pointer) == (id(tensor), tensor.data_ptr())
        assert torch.equal(value, tensor)
    assert (net.conv1.out_channels, net.bn2.num_features) == (8, 12)


def test_a_dry_run_says_what_would_leave_and_does_nothing() -> None:
    net = built("plain")
    plan = pruned(net, MACs(0.5), dry_run=True)
    assert plan.removed
    assert any("->" in line for line in plan.lines())
    assert net.conv1.out_channels == 8


def test_data_that_only_training_has_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"needs .*grad.* Use the callback in a Trainer"):
        pruned(built("plain"), MACs(0.5), criterion=Taylor())


def test_a_ranking_of_ones_own() -> None:
    class OnlyFirst(Ranking):
        def scope(self, group: Any, model: Any) -> str:
            return "first" if group.name == "conv1" else "rest"

    net = built("plain")
    assert pruned(net, MACs(0.6), ranking=OnlyFirst()).after <= 0.6 * cost(built("plain"), MACs(0.6))
