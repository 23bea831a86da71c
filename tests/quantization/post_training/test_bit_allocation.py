"""Bits under a budget: kept, monotone, the best there is, and never worse than uniform bits of the same size."""

import itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from lightning_light.errors import BudgetError
from lightning_light.quantization import BitBudget, Int8, IntN, Sensitivity

WIDTHS = (2, 3, 4, 8)


@st.composite
def scans(draw: st.DrawFn, most: int = 4) -> Sensitivity:
    count = draw(st.integers(1, most))
    layers = [f"layer{place}.conv" for place in range(count)]
    distances = {}
    for layer in layers:
        distances[layer] = dict(zip(WIDTHS, draw(st.lists(st.floats(0, 10), min_size=4, max_size=4)), strict=True))
    sizes = draw(st.lists(st.integers(1, 5000), min_size=2 * count, max_size=2 * count))
    return Sensitivity(
        distances, dict(zip(layers, sizes[:count], strict=True)), dict(zip(layers, sizes[count:], strict=True))
    )


def total(scan: Sensitivity, found: dict[str, int]) -> float:
    return sum(scan.distances[layer][width] for layer, width in found.items())


def size_of(scan: Sensitivity, found: dict[str, int]) -> int:
    return sum(scan.weights[layer] * width for layer, width in found.items())


@settings(deadline=None)
@given(scan=scans(), fraction=st.floats(0, 1))
def test_the_size_is_within_the_budget_and_nothing_is_better(scan, fraction) -> None:
    least, most = (size_of(scan, dict.fromkeys(scan.distances, width)) for width in (2, 8))
    limit = -(-round(least + fraction * (most - least)) // 8)
    found = BitBudget(size=limit).solve(scan)
    assert size_of(scan, found) <= 8 * limit
    ways = (
        dict(zip(scan.distances, way, strict=True)) for way in itertools.product(WIDTHS, repeat=len(scan.distances))
    )
    assert total(scan, found) == pytest.approx(min(total(scan, way) for way in ways if size_of(scan, way) <= 8 * limit))


@settings(deadline=None)
@given(scan=scans(), fraction=st.floats(0.25, 1))
def test_bit_operations_are_within_the_budget(scan, fraction) -> None:
    found = BitBudget(bops=fraction).solve(scan)
    spent = sum(scan.macs[layer] * width for layer, width in found.items())
    assert spent <= fraction * 8 * sum(scan.macs.values())


def large(layers: int) -> Sensitivity:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(100, 2_000_000, (layers,), generator=generator).tolist()
    noise = torch.rand(layers, 4, generator=generator).sort(1, descending=True).values.tolist()
    names = [f"layer{place}" for place in range(layers)]
    distances = {name: dict(zip(WIDTHS, row, strict=True)) for name, row in zip(names, noise, strict=True)}
    return Sensitivity(distances, dict(zip(names, sizes, strict=True)), dict(zip(names, sizes, strict=True)))


def test_a_large_network_is_solved() -> None:
    """Sixty layers. More bytes are never worse, uniform bits never better."""
    scan = large(60)
    before = float("inf")
    for width in torch.linspace(2, 8, 13).tolist():
        limit = int(sum(scan.weights.values()) * width) // 8 + 1
        found = BitBudget(size=limit).solve(scan)
        assert size_of(scan, found) <= 8 * limit
        assert total(scan, found) <= before
        before = total(scan, found)
        if width in WIDTHS:
            uniform = total(scan, dict.fromkeys(scan.distances, int(width)))
            assert before < uniform if width in (3, 4) else before == uniform


def test_the_recipe_has_a_width_for_each_layer_also_for_one_inside_another() -> None:
    scan = Sensitivity({"a": {2: 1.0, 4: 0.5}, "a.b": {2: 9.0, 4: 0.0}}, {"a": 80, "a.b": 80}, {})
    base = IntN(weights=8, activations=None, engine="x86", exclude=["head"])
    recipe = BitBudget(size=60).recipe(scan, base)
    inner = nn.Linear(2, 2)
    inner.add_module("b", nn.Linear(2, 2))
    net = nn.ModuleDict({"a": inner, "head": nn.Linear(2, 2)})
    rules = recipe.specs(net, ["a", "a.b", "head"])
    assert {layer: rule.weight.bits for layer, rule in rules.items()} == {"a": 2, "a.b": 4}
    assert recipe.engine == "x86"


@settings(max_examples=5, deadline=None)
@given(scan=scans())
def test_a_budget_that_cannot_be_kept_says_what_is_least(scan) -> None:
    with pytest.raises(BudgetError, match=r"with 2 bits in every layer 0\.250 of the bit operations"):
        BitBudget(bops=0.2).solve(scan)
    least = sum(scan.weights.values()) * 2
    if least > 8:
        with pytest.raises(BudgetError, match=f"the weights still take {-(-least // 8)} bytes"):
            BitBudget(size=(least - 1) // 8).solve(scan)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "expected one of `size` and `bops`"),
        ({"size": "1 kB", "bops": 0.5}, "expected one of `size` and `bops`"),
        ({"size": "much"}, "expected a number and a unit"),
        ({"bops": 40}, "0 < bops <= 1"),
        ({"size": "1 kB", "widths": (4, 12)}, "expected a sequence of 2 <= value <= 8 or None, found 12"),
    ],
)
def test_wrong_values_are_refused(options, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        BitBudget(**options)


def test_widths_have_to_be_measured() -> None:
    scan = Sensitivity({"a": {4: 0.5}}, {"a": 80}, {"a": 1})
    with pytest.raises(ValueError, match=r"found \[2\] besides"):
        BitBudget(size=60, widths=(2, 4)).solve(scan)
    assert BitBudget(size=60, widths=[4]).solve(scan) == {"a": 4}
    assert Int8() != IntN()
