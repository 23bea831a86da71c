"""The rules of dynamic sparse training, restated plainly in float64, and as properties."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from lightning_light.schedules import Cosine
from lightning_light.sparsity import SET, Connections, RigL, SRigL, Static


def layer(shape=(6, 10), density=0.4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(shape, generator=generator) < density
    mask.view(-1)[0] = True
    return weight * mask, mask, torch.randn(shape, generator=generator, dtype=torch.float64)


def draw():
    return torch.Generator().manual_seed(7)


def moved(method, weight, mask, gradient, fraction, first, generator=None):
    return method.update(Connections(weight, mask, gradient, first, generator or draw()), fraction)


def top(values: dict[int, float], count: int) -> set[int]:
    return set(sorted(values, key=lambda place: -values[place])[:count])


@pytest.mark.parametrize("seed", range(5))
def test_rigl_is_the_papers_algorithm(seed) -> None:
    """Evci et al., 2020, algorithm 1: drop ArgTopK(-|theta|, k), grow ArgTopK over i not in theta minus dropped."""
    weight, mask, gradient = layer(seed=seed)
    w, m, g = weight.flatten().tolist(), mask.flatten().tolist(), gradient.flatten().tolist()
    active = {place for place, there in enumerate(m) if there}
    k = math.floor(0.3 * len(active))
    dropped = top({place: -abs(w[place]) for place in active}, k)
    survivors = active - dropped
    grown = top({place: abs(g[place]) for place in range(len(m)) if place not in survivors}, k)
    found = moved(RigL(), weight, mask, gradient, 0.3, 0)
    assert {place for place, there in enumerate(found.flatten().tolist()) if there} == survivors | grown


@pytest.mark.parametrize("progress", [0.0, 0.25, 0.5, 1.0])
def test_rigls_fraction_decays_by_a_cosine(progress) -> None:
    assert RigL(0.3).fraction_at(Cosine()(progress)) == pytest.approx(0.3 / 2 * (1 + math.cos(progress * math.pi)))
    assert SET(0.3).fraction_at(Cosine()(progress)) == 0.3


@pytest.mark.parametrize("seed", range(5))
def test_set_drops_the_smallest_weights_of_either_sign(seed) -> None:
    """Mocanu et al., 2018, algorithm 1: a fraction of the smallest positive and of the largest negative weights."""
    weight, mask, _ = layer(seed=seed)
    w, m = weight.flatten().tolist(), mask.flatten().tolist()
    positive = sorted((place for place, there in enumerate(m) if there and w[place] >= 0), key=lambda place: w[place])
    negative = sorted((place for place, there in enumerate(m) if there and w[place] < 0), key=lambda place: -w[place])
    stay = {*positive[math.floor(0.4 * len(positive)) :], *negative[math.floor(0.4 * len(negative)) :]}
    found = moved(SET(), weight, mask, None, 0.4, 0)
    kept = {place for place, there in enumerate(found.flatten().tolist()) if there}
    assert stay <= kept
    assert len(kept) == sum(m)
    assert not torch.equal(found, moved(SET(), weight, mask, None, 0.4, 0, torch.Generator().manual_seed(8)))


@pytest.mark.parametrize("seed", range(5))
def test_srigl_is_the_papers_algorithm(seed) -> None:
    """Lasby et al., 2024, section 3.1, steps 1 to 7, with the threshold for ablation at half of the fan-in."""
    _, _, gradient = layer((8, 12), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    method = SRigL(fraction=0.5, min_salient=0.5)
    mask = method.initial_mask(torch.rand(8, 12, generator=generator, dtype=torch.float64), 32)
    weight = torch.randn(8, 12, generator=generator, dtype=torch.float64) * mask
    fan_in, connections = 4, 32
    assert mask.sum(dim=1).tolist() == [fan_in] * 8
    k = math.floor(0.5 * connections)
    places = [(i, j) for i in range(8) for j in range(12)]
    active = [p for p in places if mask[p]]
    large = set(sorted(active, key=lambda p: -abs(float(weight[p])))[: connections - k])
    by_gradient = set(sorted((p for p in places if not mask[p]), key=lambda p: -abs(float(gradient[p])))[:k])
    salient = [sum(p[0] == i for p in large | by_gradient) for i in range(8)]
    stay = [i for i in range(8) if salient[i] >= 0.5 * fan_in]
    new_fan_in = connections // len(stay)
    expected = torch.zeros(8, 12, dtype=torch.bool)
    for i in stay:
        kept = [p for p in large if p[0] == i]
        others = sorted((p for p in places if p[0] == i and p not in large), key=lambda p: -abs(float(gradient[p])))
        for p in kept + others[: new_fan_in - len(kept)]:
            expected[p] = True
    assert torch.equal(moved(method, weight, mask, gradient, 0.5, connections), expected)


@given(
    seed=st.integers(0, 999),
    density=st.floats(0.02, 0.98),
    fraction=st.floats(0.0, 1.0),
    steps=st.integers(1, 4),
    kind=st.sampled_from([SET(), RigL(), Static()]),
)
@settings(max_examples=80, deadline=None)
def test_the_number_of_connections_never_changes(seed, density, fraction, steps, kind) -> None:
    weight, mask, gradient = layer((5, 4, 3, 3), density, seed)
    count = int(mask.sum())
    for step in range(steps):
        mask = moved(kind, weight * mask, mask, gradient + step, fraction, count)
        assert int(mask.sum()) == count


@given(
    seed=st.integers(0, 999),
    kept=st.integers(6, 200),
    fraction=st.floats(0.0, 1.0),
    salient=st.floats(0.0, 1.0),
    steps=st.integers(1, 5),
)
@settings(max_examples=80, deadline=None)
def test_the_fan_in_of_srigl_is_constant_and_its_connections_never_increase(
    seed, kept, fraction, salient, steps
) -> None:
    generator = torch.Generator().manual_seed(seed)
    method = SRigL(fraction, salient)
    mask = method.initial_mask(torch.rand(6, 4, 3, 3, generator=generator), kept)
    connections, ablated = int(mask.sum()), torch.zeros(6, dtype=torch.bool)
    for _ in range(steps):
        weight, gradient = (torch.randn(6, 4, 3, 3, generator=generator) for _ in range(2))
        mask = moved(method, weight * mask, mask, gradient, fraction, connections)
        fan_ins = mask.flatten(1).sum(dim=1)
        assert len(set(fan_ins[fan_ins > 0].tolist())) == 1
        assert connections - int((fan_ins > 0).sum()) < int(mask.sum()) <= connections
        assert not bool(((fan_ins > 0) & ablated).any())
        ablated = fan_ins == 0


@pytest.mark.parametrize("call", [lambda: SET(1.5), lambda: RigL(-0.1), lambda: SRigL(min_salient=2.0)])
def test_fractions_out_of_range_are_refused(call) -> None:
    with pytest.raises(ValueError, match="expected"):
        call()
