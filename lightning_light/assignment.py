"""Choose one option per item under budgets, with the lowest total score: the multiple-choice knapsack problem."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Assignment", "best_assignment"]

_ROUNDING = 1e-9  # relative: sums of the same numbers in another order differ by less
_STEPS = 200  # of the subgradient method
_BLOCK = 512  # partial assignments that are compared with all better ones at once


@dataclass(frozen=True)
class Assignment:
    """One option for each item.

    Attributes:
        options: index of the option of each item.
        score: sum of their scores.
        costs: sum of their costs, one per budget.
        bound: no assignment within the limits has a lower score. It equals ``score`` (up to rounding) unless partial
            assignments had to be thinned out.
    """

    options: tuple[int, ...]
    score: float
    costs: tuple[float, ...]
    bound: float


def best_assignment(
    scores: Sequence[Sequence[float]],
    costs: Sequence[Sequence[float | Sequence[float]]],
    limits: float | Sequence[float],
    *,
    max_partial: int = 50_000,
) -> Assignment | None:
    """Choose one option per item: the lowest sum of scores for which every sum of costs is within its limit.

    Dynamic programming over the items. A partial assignment is dropped if another has no higher score and no higher
    cost of any kind, if its cheapest completion exceeds a limit, or if its Lagrangian bound is above the score of an
    assignment that is already found. None of the three can drop the optimum. Scores that are to be high: negate them.
    The cheapest assignment within a limit of the score: exchange scores and costs.

    Kellerer, Pferschy and Pisinger, 2004, "Knapsack Problems", chapter 11. https://doi.org/10.1007/978-3-540-24777-7

    Args:
        scores: of each option of each item; the items may have different numbers of options. Finite, of any sign.
        costs: of each option of each item: a number, or one number per limit. Finite, of any sign; integers below
            2**53 are summed exactly.
        limits: the largest sum of costs, or one per kind of cost.
        max_partial: how many partial assignments are kept at once, those with the lowest Lagrangian bounds; the result
            is optimal if there are never more, see `Assignment.bound`. Memory and time are proportional to it.

    Returns:
        The assignment, or None if none is within the limits (with several limits and more than ``max_partial``
        assignments: if none was found). Of several with the same score the choice is deterministic.

    Raises:
        ValueError: the numbers of items, options or limits disagree, or a number is not finite.

    Example:
        >>> best_assignment(scores=[[0, 2, 9], [0, 3, 5]], costs=[[8, 4, 1], [6, 3, 1]], limits=7)
        Assignment(options=(1, 1), score=5.0, costs=(7.0,), bound=5.0)
        >>> best_assignment([[0, 2, 9], [0, 3, 5]], [[(8, 1), (4, 2), (1, 1)], [(6, 1), (3, 2), (1, 1)]], [9, 3])
        Assignment(options=(0, 2), score=5.0, costs=(9.0, 2.0), bound=5.0)
    """
    choices = _choices(scores, costs, [limits] if isinstance(limits, (int, float)) else list(limits))
    prices, feasible, best = _lagrangian(choices)
    options, bound = _dynamic_program(choices, prices, best, max_partial)
    options = feasible if options is None else options
    if options is None:
        return None
    chosen = range(len(options)), options
    total, spent = float(choices.scores[chosen].sum()), choices.costs[chosen].sum(0)
    return Assignment(tuple(options), total, tuple(spent.tolist()), min(bound, total))


@dataclass(frozen=True)
class _Choices:
    """The problem as tensors; options that an item does not have cost as much as its first, at an infinite score.

    Attributes:
        scores: ``(items, options)``.
        costs: ``(items, options, budgets)``.
        limits: ``(budgets,)``, raised by what rounding may add.
        counts: how many options each item has.
    """

    scores: Tensor
    costs: Tensor
    limits: Tensor
    counts: tuple[int, ...]

    def reduced(self, prices: Tensor) -> Tensor:
        """Return scores plus costs at ``prices``: ``(items, options)``."""
        return self.scores + self.costs @ prices


def _choices(
    scores: Sequence[Sequence[float]], costs: Sequence[Sequence[float | Sequence[float]]], limits: Sequence[float]
) -> _Choices:
    rows = [[[cost] if isinstance(cost, (int, float)) else list(cost) for cost in item] for item in costs]
    counts, budgets = tuple(map(len, scores)), len(limits)
    kinds = {len(cost) for item in rows for cost in item}
    if not counts or not all(counts) or counts != tuple(map(len, rows)) or kinds != {budgets}:
        raise ValueError(
            "`best_assignment(scores, costs, limits)`: expected a score and one cost per limit for each option, and at "
            f"least one item with one option; found {list(counts)} scores, {list(map(len, rows))} costs of "
            f"{sorted(kinds)} kinds, {budgets} limits."
        )
    most = max(counts)
    padded_scores = [[*item, *[math.inf] * (most - len(item))] for item in scores]
    padded_costs = [[*item, *[item[0]] * (most - len(item))] for item in rows]
    found = _Choices(
        torch.tensor(padded_scores, dtype=torch.float64).reshape(len(counts), most),
        torch.tensor(padded_costs, dtype=torch.float64).reshape(len(counts), most, budgets),
        torch.tensor(limits, dtype=torch.float64),
        counts,
    )
    if found.scores.isnan().any() or not all(map(math.isfinite, itertools.chain(*scores, found.costs.flatten()))):
        raise ValueError("`best_assignment(scores, costs, limits)`: expected finite scores and costs, found others.")
    rounding = _ROUNDING * found.costs.abs().amax(1).sum(0)
    return replace(found, limits=found.limits + rounding)


def _dynamic_program(
    choices: _Choices, prices: Tensor, best: float, max_partial: int
) -> tuple[list[int] | None, float]:
    """Return the best options if their score is at most ``best``, and a bound from what was thinned out."""
    cheapest, relaxed = _of_remaining(choices.costs), _of_remaining(choices.reduced(prices))
    score, cost, bound = torch.zeros(1).double(), torch.zeros(1, len(prices)).double(), math.inf
    steps = []
    for item, count in enumerate(choices.counts):
        score = (score[:, None] + choices.scores[item, :count]).flatten()
        cost = (cost[:, None] + choices.costs[item, :count]).flatten(0, 1)
        lowest = score + (cost - choices.limits) @ prices + relaxed[item + 1]
        kept = ((cost + cheapest[item + 1] <= choices.limits).all(1) & (lowest <= best)).nonzero().flatten()
        kept = kept[_non_dominated(score[kept], cost[kept])]
        if len(kept) > max_partial:
            order = lowest[kept].argsort(stable=True)
            bound = min(bound, float(lowest[kept[order[max_partial]]]))
            kept = kept[order[:max_partial]]
        score, cost = score[kept], cost[kept]
        steps.append((kept // count, kept % count))
    if not len(score) or float(score.min()) > best:
        return None, bound
    position = int(score.argmin())
    options = []
    for before, option in reversed(steps):
        options.append(int(option[position]))
        position = int(before[position])
    return options[::-1], bound


def _of_remaining(values: Tensor) -> Tensor:
    """Return the sum of the smallest values of the items from each on, ``(items + 1, ...)``."""
    smallest = values.amin(1)
    return torch.cat([smallest, torch.zeros_like(smallest[:1])]).flipud().cumsum(0).flipud()


def _lagrangian(choices: _Choices) -> tuple[Tensor, list[int] | None, float]:
    """Return prices of the costs for bounds, an assignment within the limits if one is met, and its score."""
    scores, costs, limits = choices.scores, choices.costs, choices.limits
    finite = scores[scores.isfinite()]
    slack = _ROUNDING * float(finite.abs().sum())
    scale = (costs.amax(1) - costs.amin(1)).sum(0).clamp_min(1e-300)
    spread = float(finite.max() - finite.min())
    rows = torch.arange(len(costs))
    prices, best, bound = torch.zeros_like(limits), math.inf, -math.inf
    kept, feasible = prices, None
    for step in range(_STEPS):
        chosen = choices.reduced(prices).argmin(1)
        score, excess = float(scores[rows, chosen].sum()), costs[rows, chosen].sum(0) - limits
        value = score + float(prices @ excess)
        if value > bound:
            kept, bound = prices, value
        if score < best and bool((excess <= 0).all()):
            best, feasible = score, chosen.tolist()
        gradient = excess / scale
        length = (best if best < math.inf else value + spread) - value
        if length <= slack or not gradient.any():
            break
        move = length / (1 + step / 10) / float(gradient.square().sum())
        prices = (prices + move * gradient / scale).clamp_min(0)
    return kept, feasible, best + slack


def _non_dominated(scores: Tensor, costs: Tensor) -> Tensor:
    """Return the positions of those than which no other is at most as high in the score and in every cost."""
    order = torch.arange(len(scores))
    for key in (*costs.unbind(1), scores):  # so that what dominates comes first
        order = order[key[order].argsort(stable=True)]
    front = order[:0]
    for start in range(0, len(order), _BLOCK):
        block = order[start : start + _BLOCK]
        block = block[~_dominated(costs[block], costs[front])]
        earlier = torch.ones(len(block), len(block), dtype=torch.bool).tril(-1)
        block = block[~_dominated(costs[block], costs[block], earlier)]
        front = torch.cat([front, block])
    return front


def _dominated(costs: Tensor, others: Tensor, considered: Tensor | None = None) -> Tensor:
    """Return for each of ``costs`` whether one of ``others`` is at most as high in all."""
    at_most = (others[None] <= costs[:, None]).all(2)
    return (at_most if considered is None else at_most & considered).any(1)
