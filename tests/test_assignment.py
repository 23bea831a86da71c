"""Choosing one option per item under budgets, compared with all assignments."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from lightning_light.assignment import best_assignment

NUMBERS = st.integers(-20, 80).map(lambda quarters: quarters / 4)  # sums are exact


@st.composite
def problems(draw):
    budgets = draw(st.integers(1, 3))
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    scores = [draw(st.lists(NUMBERS, min_size=n, max_size=n)) for n in counts]
    cost = st.tuples(*[NUMBERS] * budgets)
    costs = [draw(st.lists(cost, min_size=n, max_size=n)) for n in counts]
    return scores, costs, draw(st.tuples(*[st.integers(-5, 50)] * budgets))


def brute_force(scores, costs, limits):
    totals = []
    for options in itertools.product(*map(range, map(len, scores))):
        spent = [math.fsum(costs[i][o][k] for i, o in enumerate(options)) for k in range(len(limits))]
        if all(cost <= limit for cost, limit in zip(spent, limits, strict=True)):
            totals.append(math.fsum(scores[i][o] for i, o in enumerate(options)))
    return min(totals, default=None)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_no_assignment_within_the_limits_has_a_lower_score(problem):
    scores, costs, limits = problem
    found, best = best_assignment(scores, costs, limits), brute_force(scores, costs, limits)
    if best is None:
        assert found is None
        return
    assert found is not None
    assert found.score == pytest.approx(best, abs=1e-6)
    assert found.bound == found.score
    assert found.score == pytest.approx(sum(scores[i][o] for i, o in enumerate(found.options)), abs=1e-9)
    for k, limit in enumerate(limits):
        assert found.costs[k] == pytest.approx(sum(costs[i][o][k] for i, o in enumerate(found.options)), abs=1e-9)
        assert found.costs[k] <= limit


def test_many_items_are_solved_exactly_in_a_short_time():
    """As many layers as networks have, with costs that no two assignments share, and two budgets."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(60, 8, generator=generator).sort(1, descending=True).values.tolist()
    costs = torch.rand(60, 8, 2, generator=generator).sort(1).values.tolist()
    found = best_assignment(scores, costs, [20.0, 25.0])
    assert found is not None
    assert found.bound == found.score
    assert max(found.costs[0] / 20, found.costs[1] / 25) > 0.99


def test_thinned_out_the_result_is_within_the_limit_and_its_bound_holds():
    """Scores that are proportional to costs leave every assignment non-dominated."""
    sizes = [2**k + 1 for k in range(12)]
    scores, costs = [[0, -size] for size in sizes], [[0, size] for size in sizes]
    exact = best_assignment(scores, costs, 2500)
    thinned = best_assignment(scores, costs, 2500, max_partial=10)
    assert exact is not None
    assert thinned is not None
    assert exact.score == exact.bound == brute_force(scores, [[(cost,) for cost in row] for row in costs], (2500,))
    assert thinned.bound <= exact.score <= thinned.score
    assert thinned.costs[0] <= 2500


@pytest.mark.parametrize(
    ("scores", "costs", "limits"),
    [([[1.0]], [[1.0, 2.0]], 3), ([[1.0]], [[(1.0, 2.0)]], 3), ([[]], [[]], 3), ([[math.inf]], [[1.0]], 3)],
)
def test_a_malformed_problem_is_refused(scores, costs, limits):
    with pytest.raises(ValueError, match="best_assignment"):
        best_assignment(scores, costs, limits)
