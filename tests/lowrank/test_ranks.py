"""Rules for ranks, and a budget over all layers."""

import itertools
import random
import re

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from lightning_light.budgets import Latency, MACs, Params, Size
from lightning_light.errors import BudgetError
from lightning_light.example_input import ExampleInput
from lightning_light.lowrank import (
    EVBMF,
    OutputChange,
    RankAllocation,
    RankRatio,
    RetainedEnergy,
    WhitenedSVD,
    balance_factors,
    factorize,
)
from lightning_light.lowrank.allocate import Choice, allocate, frontier
from lightning_light.lowrank.build import current_ranks
from lightning_light.lowrank.factors import factor_form
from lightning_light.lowrank.layers import FactorizableLayer, find_layers
from lightning_light.lowrank.measurement import LayerTimer
from lightning_light.lowrank.options import FactorizationOptions
from lightning_light.lowrank.plan import Goal, Planner
from lightning_light.lowrank.ranks import evbmf_rank
from lightning_light.lowrank.spectra import decompose
from lightning_light.measure import count_cost, tensor_bytes
from tests.zoo import ZOO


def net() -> nn.Sequential:
    """Layers whose spectra differ: some are nearly of low rank, some are not."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 24, 3, stride=2, padding=1),
        nn.Flatten(),
        nn.Linear(24 * 16, 40),
        nn.ReLU(),
        nn.Linear(40, 30),
    )
    with torch.no_grad():
        for layer, decay in ((model[2], 0.5), (model[4], 0.95), (model[6], 0.8)):
            left, values, right = torch.linalg.svd(layer.weight.flatten(1), full_matrices=False)
            values = values[0] * decay ** torch.arange(len(values))
            layer.weight.copy_(((left * values) @ right).reshape(layer.weight.shape))
    return model


EXAMPLE = (torch.zeros(2, 3, 8, 8),)


def macs(model: nn.Module) -> float:
    return count_cost(model, EXAMPLE).macs / 2


@pytest.mark.parametrize("form", ["auto", "channel", "spatial", "tucker2"])
@pytest.mark.parametrize("round_to", [1, 2, 4])
@pytest.mark.parametrize("remaining", [0.8, 0.5, 0.3])
def test_budget_is_met_within_one_rank_step(form, round_to, remaining) -> None:
    model = net()
    dense = macs(model)
    plan = factorize(model, EXAMPLE, MACs(remaining), form=form, allocation=RankAllocation(round_to=round_to))
    assert plan.before == dense
    assert plan.after == macs(model)  # what was planned is what is counted
    assert plan.after <= remaining * dense
    unused = remaining * dense - plan.after
    layers, _ = find_layers(net(), ExampleInput(EXAMPLE), list(plan.layers), form=form, split={})
    for layer in layers:  # and no layer's rank could have been one step higher
        found = plan.layers[layer.name]
        for place in range(len(found.ranks)):
            ranks = tuple(rank + round_to * (place == axis) for axis, rank in enumerate(found.ranks))
            if len(ranks) == 1 and ranks[0] <= found.full[0]:
                assert min(layer.cost(found.form, ranks)[0], found.macs[0]) - found.macs[1] > unused
            assert unused < layer.cost(found.form, tuple(rank + round_to for rank in found.ranks))[0] - found.macs[1]


@pytest.mark.parametrize(("budget", "count"), [(Params(0.4), None), (Size("20 kB"), tensor_bytes)])
def test_plan_counts_parameters_and_bytes_exactly(budget, count) -> None:
    model = net()
    count = count or (lambda model: sum(parameter.numel() for parameter in model.parameters()))
    dense = count(model)
    plan = factorize(model, EXAMPLE, budget, allocation=RankAllocation(round_to=1))
    assert (plan.before, plan.after) == (dense, count(model))
    assert count(model) <= budget.goal(dense)


def test_ranks_for_a_budget_lose_less_than_equal_rank_ratios() -> None:
    for form in ("channel", "spatial"):
        share, uniform = 0.4, net()
        equal = factorize(uniform, EXAMPLE, RankRatio(share), form=form, allocation=RankAllocation(round_to=1))
        chosen = factorize(
            net(), EXAMPLE, MACs(equal.after / equal.before), form=form, allocation=RankAllocation(round_to=1)
        )
        assert chosen.after <= equal.after
        assert sum(f.error for f in chosen.layers.values()) < 0.7 * sum(f.error for f in equal.layers.values())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.floats(0.2, 0.95))
def test_allocation_is_near_the_optimum(seed, layers, share) -> None:
    draw = random.Random(seed)
    fronts = []
    for _ in range(layers):
        values = sorted((draw.random() for _ in range(5)), reverse=True)  # errors that fall ever more slowly
        tails = [sum(values[place:]) / sum(values) for place in range(1, 6)]
        price = draw.uniform(1, 5)
        fronts.append(frontier([Choice("x", (r,), 0, 0, price * r, tail) for r, tail in enumerate(tails, 1)]))
    limit = share * sum(front[-1].cost for front in fronts)
    every = [c for c in itertools.product(*fronts) if sum(choice.cost for choice in c) <= limit * (1 + 1e-12)]
    found = allocate(fronts, limit)
    assert (found is None) is (not every)
    if found is not None:
        best = min(sum(choice.error for choice in combination) for combination in every)
        assert sum(choice.cost for choice in found) <= limit * (1 + 1e-12)
        largest = max(a.error - b.error for front in fronts for a, b in itertools.pairwise(front))
        assert best - 1e-12 <= sum(choice.error for choice in found) <= best + largest  # within one step of the best
        for front, choice in zip(fronts, found, strict=True):  # and no step up fits any more
            dearer = [other for other in front if other.cost > choice.cost]
            if dearer:
                assert sum(c.cost for c in found) - choice.cost + dearer[0].cost > limit


def test_unreachable_budget_is_refused_with_the_model_unchanged() -> None:
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(BudgetError, match=r"`MACs\(remaining=0.001\)`: expected macs of at most .* found"):
        factorize(model, EXAMPLE, MACs(0.001))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_rule_retains_the_energy() -> None:
    for form in ("channel", "spatial", "tucker2"):
        plan = factorize(net(), EXAMPLE, RetainedEnergy(0.9), form=form, allocation=RankAllocation(round_to=1))
        assert plan.layers
        for found in plan.layers.values():
            assert found.error <= 0.1 + 1e-9


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (64, 64)])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_evbmf_finds_the_rank_above_the_noise(shape, rank) -> None:
    generator = torch.Generator().manual_seed(rank)
    signal = torch.randn(shape[0], rank, generator=generator) @ torch.randn(rank, shape[1], generator=generator)
    for noise in (0.1, 0.4):
        found = evbmf_rank(torch.linalg.svdvals(signal + noise * torch.randn(shape, generator=generator)), *shape)
        assert found == rank
    assert evbmf_rank(torch.linalg.svdvals(torch.randn(shape, generator=generator)), *shape) <= 1


def test_evbmf_uses_both_unfoldings_and_can_be_weakened() -> None:
    generator = torch.Generator().manual_seed(0)
    core = torch.randn(1, 5, 3, 3, 3, generator=generator)
    mix = torch.randn(32, 5, generator=generator), torch.randn(24, 3, generator=generator)
    weight = torch.einsum("op,iq,gpqxy->goixy", *mix, core) + 0.5 * torch.randn(1, 32, 24, 3, 3, generator=generator)
    spectrum = decompose("tucker2", weight)
    assert EVBMF()(spectrum, None) == (3, 5)
    assert EVBMF(weaken=0.5)(spectrum, None) == (round(3 + 0.5 * 21), round(5 + 0.5 * 27))


def test_output_change_stays_below_its_limit() -> None:
    model, x = net(), torch.randn(16, 3, 8, 8)
    expected = model(x).detach()
    allocation = RankAllocation(round_to=1)
    plan = factorize(
        model, EXAMPLE, OutputChange(0.01), form="channel", data=[x], targets=["2", "6"], allocation=allocation
    )
    assert set(plan.layers) == {"2", "6"}
    change = (model(x) - expected).square().sum() / expected.square().sum()
    assert change <= 0.04  # each alone 0.01; the square roots add up


def test_importance_by_output_changes_the_output_less() -> None:
    x = torch.randn(64, 3, 8, 8)
    changes = {}
    for importance in ("equal", "output"):
        model = net()
        expected = model(x).detach()
        allocation = RankAllocation(importance=importance, round_to=1)
        factorize(model, EXAMPLE, MACs(0.35), data=[x], form="channel", allocation=allocation)
        changes[importance] = float((model(x) - expected).detach().square().sum())
    assert changes["output"] <= changes["equal"] * 1.05


def test_whitening_on_data_changes_the_output_less() -> None:
    x = torch.randn(64, 3, 8, 8) * torch.tensor([5.0, 1.0, 0.1]).view(3, 1, 1)
    changes = {}
    for name, options in {"plain": {}, "whitened": {"fit": WhitenedSVD(), "data": [x]}}.items():
        model = net()
        expected = model(x).detach()
        allocation = RankAllocation(round_to=1)
        factorize(model, EXAMPLE, RankRatio(0.3), form="channel", targets="2", allocation=allocation, **options)
        changes[name] = float((model(x) - expected).detach().square().sum())
    assert changes["whitened"] < changes["plain"]


def by_rank(layer: FactorizableLayer, form: str, ranks: tuple[int, ...]) -> float:
    """Seconds of a machine on which the last layer is no faster in factors, and the others are by their rank."""
    if not form:
        return 1.0
    return 1.2 if layer.name == "8" else max(ranks) / 16


def test_latency_budget_uses_measured_times_and_skips_slower_layers() -> None:
    layers, reasons = find_layers(net(), ExampleInput(EXAMPLE), ["0", "2", "4", "6", "8"], form="channel", split={})
    options = FactorizationOptions(allocation=RankAllocation(round_to=4))
    goal = Goal(Latency(4.0), current=6.0, limit=4.0, final=4.0, price=None)
    plan = Planner(layers, reasons, options, goal, by_rank).plan()
    assert plan.skipped["8"] == "its factors do not run faster on this machine"
    timed = sum(by_rank(layer, found.form, found.ranks) for layer in layers if (found := plan.layers.get(layer.name)))
    assert plan.after == pytest.approx(6.0 - len(plan.layers) + timed)
    assert 3.0 <= plan.after <= 4.0


def test_faster_only_skips_slower_layers_with_the_reason() -> None:
    layers, reasons = find_layers(net(), ExampleInput(EXAMPLE), ["2", "8"], form="channel", split={})
    options = FactorizationOptions(allocation=RankAllocation(round_to=2, faster_only=True))
    goal = Goal(RankRatio(0.25), current=6.0, limit=6.0, final=6.0, price=lambda macs, params: macs)
    plan = Planner(layers, reasons, options, goal, by_rank).plan()
    assert list(plan.layers) == ["2"]
    assert "took 1200000 us on this machine, the layer itself 1000000 us" in plan.skipped["8"]
    assert [line.partition(":")[0] for line in plan.lines()] == ["2", "8"]


def test_faster_only_measures_on_this_machine() -> None:
    """A wide linear layer at rank 4 is many times faster; a tiny one pays for a second call more than it saves."""
    model = nn.Sequential(nn.Linear(768, 768), nn.ReLU(), nn.Linear(768, 16), nn.ReLU(), nn.Linear(16, 16))
    allocation = RankAllocation(round_to=1, faster_only=True)
    plan = factorize(model, torch.zeros(1, 768), RankRatio(0.005), allocation=allocation)
    assert list(plan.layers) == ["0"]
    assert re.search(r"\(linear, rank 1\) took \d+ us on this machine, the layer itself \d+ us", plan.skipped["4"])
    layers, _ = find_layers(net(), ExampleInput(EXAMPLE), ["2", "6"], form="spatial", split={})
    timer = LayerTimer(net(), runs=2)
    assert all(
        timer(layer, form, ranks) > 0
        for layer, form in zip(layers, ("spatial", "linear"), strict=True)
        for form, ranks in (("", ()), (form, (4,)))
    )


def test_exactly_factorizable_layer_is_counted_at_its_dense_cost() -> None:
    model = net()
    with torch.no_grad():
        model[2].weight[:, 1:] = 0.0  # rank one in every form, and not a rounding error more
    plan = factorize(model, EXAMPLE, MACs(0.7), allocation=RankAllocation(round_to=1))
    assert plan.before == macs(net())
    assert plan.after == macs(model)
    assert "2" in plan.layers


def test_second_factorization_leaves_factors_alone() -> None:
    model = net()
    first = factorize(model, EXAMPLE, MACs(0.6), form="channel", allocation=RankAllocation(round_to=2))
    ranks = {name: current_ranks(model.get_submodule(name)) for name in first.layers}
    second = factorize(model, EXAMPLE, RankRatio(0.1), form="channel", allocation=RankAllocation(round_to=2))
    assert ranks == {name: current_ranks(model.get_submodule(name)) for name in first.layers}
    assert all(second.skipped[name] == "it is factorized already" for name in first.layers)
    assert not set(first.layers) & set(second.layers)


@pytest.mark.parametrize("name", list(ZOO))
def test_every_layer_of_the_zoo_is_factorized_or_has_a_reason(name) -> None:
    model = ZOO[name]().eval()
    args, kwargs = model.example
    expected = model(*args, **kwargs)
    plan = factorize(model, ExampleInput(args, kwargs), RankRatio(0.25), allocation=RankAllocation(round_to=1))
    found = model(*args, **kwargs)
    assert isinstance(found, type(expected))
    assert plan.layers or plan.skipped
    count_cost(model, args, kwargs)
    for layer, done in plan.layers.items():
        assert factor_form(model.get_submodule(layer)) == done.form
        assert done.params[1] < done.params[0]


def test_reasons_name_the_obstacle() -> None:
    def reasons(name: str) -> dict[str, str]:
        model = ZOO[name]()
        args, kwargs = model.example
        example = ExampleInput(args, kwargs)
        return dict(factorize(model, example, RankRatio(0.5), allocation=RankAllocation(round_to=1)).skipped)

    assert "depthwise" in reasons("depthwise")["depthwise"]
    assert "another layer uses" in reasons("tied_embedding")["head"]
    assert "transposed" in reasons("transposed")["up"]


def test_balancing_changes_no_output() -> None:
    model = net()
    factorize(model, EXAMPLE, RankRatio(0.5), allocation=RankAllocation(round_to=1))
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    names = [name for name, module in model.named_modules() if factor_form(module)]
    for name in names:
        pair = model.get_submodule(name)
        pair[0].weight.data.mul_(20.0)
        pair[-1].weight.data.div_(20.0)
    assert balance_factors(model) == names
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    for name in names:
        norms = [part.weight.norm() for part in model.get_submodule(name)]
        assert max(norms) < 6.0 * min(norms)


def test_weights_that_are_not_finite_are_left_alone_by_name() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4))
    nn.init.constant_(net[0].weight, float("nan"))
    plan = factorize(net, torch.zeros(2, 32), RankRatio(0.2))
    assert plan.skipped["0"] == "its weight is not finite"
    assert "1" in plan.layers
