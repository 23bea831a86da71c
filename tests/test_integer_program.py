"""`choose_items` against the enumeration of all sets."""

import itertools
from collections.abc import Collection, Iterator

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from lightning_light.integer_program import choose_items


def solutions(count: int) -> Iterator[tuple[int, ...]]:
    for size in range(count + 1):
        yield from itertools.combinations(range(count), size)


def is_near(found: Collection[int], near: tuple[Collection[int], int] | None) -> bool:
    return near is None or len({*found} ^ {*near[0]}) <= near[1]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 9), st.integers(1, 2))
def test_the_choice_is_that_of_brute_force(seed: int, count: int, budgets: int) -> None:
    draw = np.random.default_rng(seed)
    scores, costs = draw.random(count), -draw.random((budgets, count))
    limits = [float(costs[b].sum() * draw.random()) for b in range(budgets)]
    exclusive = [set(draw.permutation(count)[:2].tolist()) for _ in range(3)] if count > 2 else []
    excluded = [set(draw.permutation(count)[: draw.integers(count + 1)].tolist()) for _ in range(3)]
    near = (excluded[0], int(draw.integers(1, 5))) if draw.random() < 0.5 else None
    allowed = [
        list(one)
        for one in solutions(count)
        if all(sum(costs[b][list(one)]) <= limits[b] + 1e-9 for b in range(budgets))
        and all(len(group & {*one}) <= 1 for group in exclusive)
        and {*one} not in excluded
        and is_near(one, near)
    ]
    found = choose_items(scores.tolist(), costs.tolist(), limits, exclusive=exclusive, excluded=excluded, near=near)
    if not allowed:
        assert found is None
    else:
        assert found in allowed
        assert scores[found].sum() == pytest.approx(min(scores[one].sum() for one in allowed))


def test_costs_of_any_unit_are_solved() -> None:
    scores, costs = [1.0, 1.1, 2.5], [[-1e-6, -2e-6, -3e-6], [-1e9, -1e9, -1e9]]
    assert choose_items(scores, costs, [-2e-6, -1e9]) == [1]
    assert choose_items(scores, costs, [-4e-6, -1e9]) == [0, 2]


def test_scores_of_any_size_are_solved_exactly() -> None:
    scores = [3e-9, 2e-9, 1e-9, 2.5e-9]
    assert choose_items(scores, [[-1.0, -1.0, -1.0, -1.0]], [-2.0]) == [1, 2]
    assert choose_items([7.0, 1e-3, 1.001e-3], [[-5.0, -1.0, -1.0]], [-6.0]) == [0, 1]
    assert choose_items([2e-309, 1e-309, 3e-309], [[-1.0, -1.0, -1.0]], [-1.0]) == [1]  # subnormal
