"""Patterns and scopes against plain formulas, and as properties."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from lightning_light.budgets import Sparsity
from lightning_light.errors import BudgetError, TargetError
from lightning_light.sparsity import NM, Block, Column, Filter, Kernel, Row, Unstructured
from lightning_light.sparsity.options import WeightPruningOptions
from lightning_light.sparsity.planning import PruningPlan, plan_pruning
from lightning_light.sparsity.scope import apportion, erk_densities, lowest
from lightning_light.sparsity.weights import find_weights
from lightning_light.targets import Targets
from tests.zoo import ZOO

SINGLE = Unstructured()
PATTERNS = [Unstructured(), Block(4, 1), Block(2, 2), Filter(), Kernel(), Row(), Column()]
SHAPES = [(8, 4), (8, 4, 3), (8, 4, 3, 3), (12, 8, 1, 5)]


def planned(model, *, pattern=SINGLE, scope="global", sparsity=0.5, current=None, own=None, fraction=1.0):
    options = WeightPruningOptions(Sparsity(sparsity), pattern=pattern, scope=scope)
    weights = find_weights(model, Targets(), "test")
    scores = {weight.name: weight.parameter.detach().square() for weight in weights}
    oriented = {weight.name: weight.oriented(scores[weight.name]) for weight in weights}
    return weights, scores, PruningPlan(options, weights, own or {}).masks(oriented, fraction, current)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(64, 12))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_units_of_a_pattern_are_masked_together(pattern, shape) -> None:
    scores = torch.rand(shape)
    units = pattern.pool(scores)
    size = scores.numel() // units.numel()
    assert units.numel() * size == scores.numel()
    for place in range(0, units.numel(), 5):
        one = torch.zeros(units.numel(), dtype=torch.bool)
        one[place] = True
        mask = pattern.expand(one.reshape(units.shape), scores.shape)
        assert mask.shape == scores.shape
        assert int(mask.sum()) == size
        torch.testing.assert_close(scores[mask].mean(), units.reshape(-1)[place])


def test_each_pattern_by_hand() -> None:
    w = torch.arange(2 * 2 * 3 * 3.0).reshape(2, 2, 3, 3)
    torch.testing.assert_close(Filter().pool(w).reshape(-1), torch.stack([w[0].mean(), w[1].mean()]))
    torch.testing.assert_close(Kernel().pool(w).reshape(2, 2), w.mean(dim=(2, 3)))
    torch.testing.assert_close(Row().pool(w).squeeze(), torch.stack([w[..., y, :].mean(-1) for y in range(3)], -1))
    torch.testing.assert_close(Column().pool(w).squeeze(), torch.stack([w[..., :, x].mean(-1) for x in range(3)], -1))
    flat = torch.arange(8.0).reshape(4, 2)
    torch.testing.assert_close(Row().pool(flat).squeeze(), flat.mean(dim=1))
    torch.testing.assert_close(Column().pool(flat).squeeze(), flat.mean(dim=0))
    torch.testing.assert_close(Block(4, 1).pool(flat), flat.mean(dim=0, keepdim=True))


@given(n=st.integers(1, 7), m=st.integers(2, 8), groups=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_n_of_every_m_stay_and_they_are_the_largest(n, m, groups, seed) -> None:
    if n >= m:
        n = m - 1
    scores = torch.rand(6, m * groups, 3, generator=torch.Generator().manual_seed(seed))
    mask = NM(n, m).mask(scores, n)
    for out in range(6):
        for place in range(3):
            for group in range(groups):
                part = slice(group * m, (group + 1) * m)
                kept, values = mask[out, part, place], scores[out, part, place]
                assert int(kept.sum()) == n
                assert values[kept].min() >= values[~kept].max()


def test_an_nm_pattern_tightens_on_the_way() -> None:
    assert [NM(2, 4).kept_at(fraction) for fraction in (0.0, 0.49, 0.5, 0.99, 1.0)] == [4, 4, 3, 3, 2]
    assert NM(2, 4).sparsity == 0.5


@pytest.mark.parametrize("scope", ["local", "global", "erk", "lamp"])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.97])
def test_the_sparsity_is_exact(scope, sparsity) -> None:
    _, _, masks = planned(net(), scope=scope, sparsity=sparsity)
    total = sum(mask.numel() for mask in masks.values())
    zeros = sum(int((~mask).sum()) for mask in masks.values())
    local = sum(round(sparsity * mask.numel()) for mask in masks.values())
    exact = local if scope == "local" else round(sparsity * total)
    assert zeros == exact
    assert all(bool(mask.any()) for mask in masks.values())


def test_global_is_one_threshold_for_all() -> None:
    _, scores, masks = planned(net(), sparsity=0.8)
    kept = torch.cat([scores[name][mask] for name, mask in masks.items()])
    gone = torch.cat([scores[name][~mask] for name, mask in masks.items()])
    assert kept.min() >= gone.max()


def test_lamp_is_the_papers_score() -> None:
    """Lee et al., 2021, eq. 1: ``w_u^2 / sum_{v >= u} w_v^2`` over ascending indices; then one threshold."""
    _, scores, masks = planned(net(), scope="lamp", sparsity=0.8)
    lamp = {}
    for name, score in scores.items():
        flat = score.double().flatten()
        lamp[name] = torch.stack([value / flat[flat >= value].sum() for value in flat]).reshape(score.shape)
    kept = torch.cat([lamp[name][mask] for name, mask in masks.items()])
    gone = torch.cat([lamp[name][~mask] for name, mask in masks.items()])
    assert kept.min() >= gone.max() - 1e-6


@given(
    widths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3])), min_size=1, max_size=5),
    amount=st.floats(0.0, 0.98),
)
@settings(max_examples=60, deadline=None)
def test_erk_is_the_papers_formula(widths, amount) -> None:
    shapes = [torch.Size((o, i, k, k)) for o, i, k in widths]
    densities = erk_densities(shapes, amount)
    sizes = [shape.numel() for shape in shapes]
    assert all(0.0 <= density <= 1.0 + 1e-9 for density in densities)
    kept = sum(density * size for density, size in zip(densities, sizes, strict=True))
    assert math.isclose(kept, (1.0 - amount) * sum(sizes), rel_tol=1e-6, abs_tol=1e-6)
    raw = [sum(shape) / shape.numel() for shape in shapes]  # (out + in + kh + kw) / (out * in * kh * kw)
    free = [place for place, density in enumerate(densities) if density < 1.0 - 1e-9]
    epsilons = [densities[place] / raw[place] for place in free]
    assert all(math.isclose(epsilon, epsilons[0], rel_tol=1e-6) for epsilon in epsilons)


@given(wanted=st.lists(st.floats(0.0, 9.0), min_size=1, max_size=6), extra=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_shares_are_apportioned_exactly(wanted, extra) -> None:
    total = min(sum(int(value) for value in wanted) + extra, 9 * len(wanted))
    counts = apportion(wanted, [9] * len(wanted), total)
    assert sum(counts) == total
    assert all(0 <= count <= 9 for count in counts)


@pytest.mark.parametrize("scope", ["local", "global", "erk", "lamp"])
@pytest.mark.parametrize("pattern", [*PATTERNS, NM(2, 4)], ids=str)
def test_masks_never_grow_back(pattern, scope) -> None:
    model, current = net(), {}
    for fraction in (0.2, 0.5, 0.4, 1.0):
        _, _, masks = planned(model, pattern=pattern, scope=scope, sparsity=0.7, fraction=fraction, current=current)
        assert all(not bool((masks[name] & ~mask).any()) for name, mask in current.items())
        current = masks
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))


def test_a_layer_has_its_own_sparsity() -> None:
    weights, _, masks = planned(net(), sparsity=0.5, own={"3.weight": 0.25})
    assert int((~masks["3.weight"]).sum()) == round(0.25 * 12 * 64)
    rest = [masks[weight.name] for weight in weights if weight.name != "3.weight"]
    assert sum(int((~mask).sum()) for mask in rest) == round(0.5 * sum(mask.numel() for mask in rest))


@pytest.mark.parametrize("scope", ["global", "erk", "lamp"])
def test_a_budget_that_leaves_a_layer_without_weights_is_refused(scope) -> None:
    with pytest.raises(BudgetError, match=r"each of 3 layers keeps one unit .* Lower the sparsity to 0\.99"):
        plan_pruning("WeightPruning", net(), WeightPruningOptions(Sparsity(0.9999), scope=scope))


def test_equal_scores_go_in_order() -> None:
    assert lowest(torch.tensor([2.0, 1.0, 1.0, 1.0]), 2).tolist() == [False, True, True, False]
    assert not lowest(torch.tensor([1.0, float("nan")]), 1)[1]


@pytest.mark.parametrize(("pattern", "layer"), [(NM(2, 4), "stem"), (Block(4, 1), "fc")])
def test_a_width_that_does_not_divide_is_refused(pattern, layer) -> None:
    model = nn.Sequential()
    model.add_module("stem", nn.Conv2d(3, 8, 3))
    model.add_module("fc", nn.Linear(8, 5))
    with pytest.raises(TargetError, match=rf"on `{layer}`: expected .*found .*exclude=\['{layer}'\]"):
        plan_pruning("WeightPruning", model, WeightPruningOptions(Sparsity(0.5), pattern=pattern))


def test_transposed_convolutions_are_masked_per_output() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(8, 6, 3))
    _, _, masks = planned(model, pattern=Filter(), scope="local", sparsity=0.5)
    assert masks["0.weight"].all(dim=3).all(dim=2).all(dim=0).sum() == 3
    _, _, masks = planned(model, pattern=NM(2, 4), scope="local")
    assert bool((masks["0.weight"].reshape(2, 4, 6, 3, 3).sum(dim=1) == 2).all())


@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_net_can_be_masked(name) -> None:
    weights, _, masks = planned(ZOO[name](), scope="erk", sparsity=0.5)
    assert list(masks) == [weight.name for weight in weights]
    assert all(masks[weight.name].shape == weight.parameter.shape for weight in weights)


@pytest.mark.parametrize("call", [lambda: NM(4, 4), lambda: NM(0, 4), lambda: Block(0, 1)])
def test_impossible_patterns_are_refused(call) -> None:
    with pytest.raises(ValueError, match=r"`(NM|Block)\(.*expected"):
        call()
