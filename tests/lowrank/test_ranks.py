"""Rules for ranks, and a budget over all layers."""

import itertools
import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_light.budgets import Latency, MACs, Params, Size
from lightning_light.errors import BudgetError
from lightning_light.example_input import ExampleInput
from lightning_light.lowrank import (
    EVBMF,
    EnergyKept,
    LowRankFactorization,
    OutputChange,
    RankRatio,
    WhitenedSVD,
    balance_factors,
    factorize,
)
from lightning_light.lowrank.allocate import Choice, allocate, frontier
from lightning_light.lowrank.build import current_ranks, factor_form
from lightning_light.lowrank.costs import LayerTimer
from lightning_light.lowrank.fits import WeightSVD
from lightning_light.lowrank.layers import Layer, find_layers
from lightning_light.lowrank.plan import Options, plan_factors
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
def test_a_budget_is_hit_within_one_rank_step(form, round_to, remaining) -> None:
    model = net()
    dense = macs(model)
    plan = factorize(model, EXAMPLE, factorization=LowRankFactorization(MACs(remaining), form=form, round_to=round_to))
    assert plan.before == dense
    assert plan.after == macs(model)  # what was planned is what is counted
    assert plan.after <= remaining * dense
    spare = remaining * dense - plan.after
    layers, _ = find_layers(net(), ExampleInput(EXAMPLE), list(plan.layers), form=form, blocks={})
    for layer in layers:  # and no layer's rank could have been one step higher
        found = plan.layers[layer.name]
        for place in range(len(found.ranks)):
            ranks = tuple(rank + round_to * (place == axis) for axis, rank in enumerate(found.ranks))
            if len(ranks) == 1 and ranks[0] <= found.full[0]:
                assert min(layer.cost(found.form, ranks)[0], found.macs[0]) - found.macs[1] > spare
            assert spare < layer.cost(found.form, tuple(rank + round_to for rank in found.ranks))[0] - found.macs[1]


@pytest.mark.parametrize(("budget", "count"), [(Params(0.4), None), (Size("20 kB"), tensor_bytes)])
def test_parameters_and_bytes_are_what_they_are_said_to_be(budget, count) -> None:
    model = net()
    count = count or (lambda model: sum(parameter.numel() for parameter in model.parameters()))
    dense = count(model)
    plan = factorize(model, EXAMPLE, factorization=LowRankFactorization(budget, round_to=1))
    assert (plan.before, plan.after) == (dense, count(model))
    assert count(model) <= budget.goal(dense)


def test_ranks_for_a_budget_lose_less_than_the_same_share_of_every_rank() -> None:
    for form in ("channel", "spatial"):
        share, uniform = 0.4, net()
        equal = factorize(
            uniform, EXAMPLE, factorization=LowRankFactorization(ranks=RankRatio(share), form=form, round_to=1)
        )
        chosen = factorize(
            net(), EXAMPLE, factorization=LowRankFactorization(MACs(equal.after / equal.before), form=form, round_to=1)
        )
        assert chosen.after <= equal.after
        assert sum(f.error for f in chosen.layers.values()) < 0.7 * sum(f.error for f in equal.layers.values())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.floats(0.2, 0.95))
def test_allocation_is_near_the_best_of_all_and_exact_on_convex_fronts(seed, layers, share) -> None:
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


def test_a_budget_out_of_reach_is_refused_and_the_model_is_as_it_was() -> None:
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(BudgetError, match=r"`MACs\(remaining=0.001\)`: expected macs of at most .* found"):
        factorize(model, EXAMPLE, factorization=LowRankFactorization(MACs(0.001)))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_energy_is_kept() -> None:
    for form in ("channel", "spatial", "tucker2"):
        plan = factorize(
            net(), EXAMPLE, factorization=LowRankFactorization(ranks=EnergyKept(0.9), form=form, round_to=1)
        )
        assert plan.layers
        for found in plan.layers.values():
            assert found.error <= 0.1 + 1e-9


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (64, 64)])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_evbmf_finds_the_rank_below_the_noise(shape, rank) -> None:
    generator = torch.Generator().manual_seed(rank)
    signal = torch.randn(shape[0], rank, generator=generator) @ torch.randn(rank, shape[1], generator=generator)
    for noise in (0.1, 0.4):
        found = evbmf_rank(torch.linalg.svdvals(signal + noise * torch.randn(shape, generator=generator)), *shape)
        assert found == rank
    assert evbmf_rank(torch.linalg.svdvals(torch.randn(shape, generator=generator)), *shape) <= 1


def test_evbmf_of_both_unfoldings_and_weakened() -> None:
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
    method = LowRankFactorization(
        ranks=OutputChange(0.01), form="channel", round_to=1, calibration=[x], targets=["2", "6"]
    )
    plan = factorize(model, EXAMPLE, factorization=method)
    assert set(plan.layers) == {"2", "6"}
    change = (model(x) - expected).square().sum() / expected.square().sum()
    assert change <= 0.04  # each alone 0.01; the square roots add up


def test_errors_weighed_by_the_output_change_the_output_less() -> None:
    x = torch.randn(64, 3, 8, 8)
    changes = {}
    for importance in ("equal", "output"):
        model = net()
        expected = model(x).detach()
        method = LowRankFactorization(MACs(0.35), importance=importance, calibration=[x], round_to=1, form="channel")
        factorize(model, EXAMPLE, factorization=method)
        changes[importance] = float((model(x) - expected).detach().square().sum())
    assert changes["output"] <= changes["equal"] * 1.05


def test_whitening_on_given_batches_changes_the_output_less() -> None:
    x = torch.randn(64, 3, 8, 8) * torch.tensor([5.0, 1.0, 0.1]).view(3, 1, 1)
    changes = {}
    for name, options in {"plain": {}, "whitened": {"fit": WhitenedSVD(), "calibration": [x]}}.items():
        model = net()
        expected = model(x).detach()
        method = LowRankFactorization(ranks=RankRatio(0.3), form="channel", targets="2", round_to=1, **options)
        factorize(model, EXAMPLE, factorization=method)
        changes[name] = float((model(x) - expected).detach().square().sum())
    assert changes["whitened"] < changes["plain"]


def by_rank(layer: Layer, form: str, ranks: tuple[int, ...]) -> float:
    """Seconds of a machine on which the last layer is no faster in factors, and the others are by their rank."""
    if not form:
        return 1.0
    return 1.2 if layer.name == "8" else max(ranks) / 16


def test_a_budget_of_latency_counts_what_was_timed_and_leaves_what_is_not_faster() -> None:
    layers, reasons = find_layers(net(), ExampleInput(EXAMPLE), ["0", "2", "4", "6", "8"], form="channel", blocks={})
    options = Options(WeightSVD(), None, 4, 1, False)
    plan = plan_factors(layers, reasons, options, budget=Latency(4.0), now=6.0, limit=4.0, evidence={}, timer=by_rank)
    assert plan.skipped["8"] == "its factors do not run faster on this machine"
    timed = sum(by_rank(layer, found.form, found.ranks) for layer in layers if (found := plan.layers.get(layer.name)))
    assert plan.after == pytest.approx(6.0 - len(plan.layers) + timed)
    assert 3.0 <= plan.after <= 4.0


def test_what_does_not_run_faster_stays_and_the_table_says_so() -> None:
    layers, reasons = find_layers(net(), ExampleInput(EXAMPLE), ["2", "8"], form="channel", blocks={})
    options = Options(WeightSVD(), RankRatio(0.25), 2, 1, True)
    plan = plan_factors(layers, reasons, options, budget=None, now=6.0, limit=0.0, evidence={}, timer=by_rank)
    assert list(plan.layers) == ["2"]
    assert "took 1200000 us here, the layer itself 1000000 us" in plan.skipped["8"]
    assert [line.partition(":")[0] for line in plan.lines()] == ["2", "8"]


def test_only_what_a_clock_says_is_faster_is_factored() -> None:
    """A wide linear layer at rank 4 is many times faster; a tiny one pays for a second call more than it saves."""
    model = nn.Sequential(nn.Linear(768, 768), nn.ReLU(), nn.Linear(768, 16), nn.ReLU(), nn.Linear(16, 16))
    method = LowRankFactorization(ranks=RankRatio(0.005), round_to=1, faster_only=True)
    plan = factorize(model, (torch.zeros(1, 768),), factorization=method)
    assert list(plan.layers) == ["0"]
    assert re.search(r"\(linear, rank 1\) took \d+ us here, the layer itself \d+ us", plan.skipped["4"])
    layers, _ = find_layers(net(), ExampleInput(EXAMPLE), ["2", "6"], form="spatial", blocks={})
    timer = LayerTimer(net(), runs=2)
    assert all(
        timer(layer, form, ranks) > 0
        for layer, form in zip(layers, ("spatial", "linear"), strict=True)
        for form, ranks in (("", ()), (form, (4,)))
    )


def test_a_layer_that_factors_represent_exactly_is_counted_as_it_was() -> None:
    model = net()
    with torch.no_grad():
        model[2].weight[:, 1:] = 0.0  # rank one in every form, and not a rounding error more
    plan = factorize(model, EXAMPLE, factorization=LowRankFactorization(MACs(0.7), round_to=1))
    assert plan.before == macs(net())
    assert plan.after == macs(model)
    assert "2" in plan.layers


def test_a_second_factorization_never_factors_factors() -> None:
    model = net()
    first = factorize(model, EXAMPLE, factorization=LowRankFactorization(MACs(0.6), form="channel", round_to=2))
    ranks = {name: current_ranks(model.get_submodule(name)) for name in first.layers}
    second = factorize(
        model, EXAMPLE, factorization=LowRankFactorization(ranks=RankRatio(0.1), form="channel", round_to=2)
    )
    assert ranks == {name: current_ranks(model.get_submodule(name)) for name in first.layers}
    assert all(second.skipped[name] == "it is factored already" for name in first.layers)
    assert not set(first.layers) & set(second.layers)


@pytest.mark.parametrize("name", list(ZOO))
def test_every_net_of_the_zoo_is_factored_or_said_why_not(name) -> None:
    model = ZOO[name]().eval()
    args, kwargs = model.example
    expected = model(*args, **kwargs)
    plan = factorize(model, args, kwargs, factorization=LowRankFactorization(ranks=RankRatio(0.25), round_to=1))
    found = model(*args, **kwargs)
    assert isinstance(found, type(expected))
    assert plan.layers or plan.skipped
    count_cost(model, args, kwargs)
    for layer, done in plan.layers.items():
        assert factor_form(model.get_submodule(layer)) == done.form
        assert done.params[1] < done.params[0]


def test_reasons_are_named() -> None:
    def reasons(name: str) -> dict[str, str]:
        model = ZOO[name]()
        args, kwargs = model.example
        method = LowRankFactorization(ranks=RankRatio(0.5), round_to=1)
        return dict(factorize(model, args, kwargs, factorization=method).skipped)

    assert "depthwise" in reasons("depthwise")["depthwise"]
    assert "another layer too" in reasons("tied_embedding")["head"]
    assert "transposed" in reasons("transposed")["up"]


def test_balancing_changes_no_answer() -> None:
    model = net()
    factorize(model, EXAMPLE, factorization=LowRankFactorization(ranks=RankRatio(0.5), round_to=1))
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
