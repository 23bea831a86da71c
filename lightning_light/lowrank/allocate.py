"""Allocate ranks to all layers under one budget: the smallest total error for the cost."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Choice", "allocate", "frontier"]


@dataclass(frozen=True)
class Choice:
    """One form and rank of a layer, or the layer as it is.

    Attributes:
        form: ``""`` for the layer as it is.
        ranks: within a group.
        macs: per sample.
        params: weights of the factors; neither count includes the bias.
        cost: in the quantity of the budget.
        error: fraction of the layer's energy that is lost, in [0, 1].
    """

    form: str
    ranks: tuple[int, ...]
    macs: float
    params: int
    cost: float
    error: float


def frontier(choices: Sequence[Choice]) -> list[Choice]:
    """Return the Pareto-optimal choices: ascending in cost, descending in error."""
    best: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.cost, choice.error)):
        if not best or choice.error < best[-1].error:
            best.append(choice)
    return best


def allocate(
    fronts: Sequence[Sequence[Choice]], limit: float, weights: Sequence[float] | None = None
) -> list[Choice] | None:
    """Choose one of its choices for every layer, with a total cost of at most ``limit`` and a small total error.

    All layers start at their most expensive choice. The layer that adds the least error per saved cost moves down its
    lower convex hull, until the limit is met; on the corners of the hulls this is optimal (the greedy solution of the
    continuous knapsack problem). Then layers move up again by single choices while any fits the limit.

    Args:
        fronts: the choices of each layer, as `frontier` returns them.
        limit: of the sum of costs.
        weights: of the errors of each layer; equal by default.

    Returns:
        The choices, or None if even the cheapest exceed the limit.

    Example:
        >>> front = [Choice("svd", (rank,), 0, 0, cost=10.0 * rank, error=0.5**rank) for rank in (1, 2, 3)]
        >>> [choice.ranks for choice in allocate([front, front], limit=50.0)]
        [(2,), (3,)]
    """
    weights = weights or [1.0] * len(fronts)
    places = [len(front) - 1 for front in fronts]
    hulls = [_hull(front) for front in fronts]
    total = sum(front[-1].cost for front in fronts)
    moves: list[tuple[float, int]] = []
    for layer, hull in enumerate(hulls):
        _offer(moves, layer, fronts[layer], hull, weights[layer])
    while total > limit and moves:
        _, layer = heapq.heappop(moves)
        hull, front = hulls[layer], fronts[layer]
        hull.pop()
        total -= front[places[layer]].cost - front[hull[-1]].cost
        places[layer] = hull[-1]
        _offer(moves, layer, front, hull, weights[layer])
    if total > limit * (1 + 1e-12):
        return None
    _spend(fronts, places, weights, limit)
    return [front[place] for front, place in zip(fronts, places, strict=True)]


def _offer(moves: list[tuple[float, int]], layer: int, front: Sequence[Choice], hull: list[int], weight: float) -> None:
    if len(hull) > 1:
        here, there = front[hull[-1]], front[hull[-2]]
        heapq.heappush(moves, (weight * (there.error - here.error) / (here.cost - there.cost), layer))


def _hull(front: Sequence[Choice]) -> list[int]:
    """Return the positions of the lower convex hull of (cost, error), ascending in cost."""
    hull: list[int] = []
    for place, choice in enumerate(front):
        while len(hull) > 1 and _is_above(front[hull[-2]], front[hull[-1]], choice):
            hull.pop()
        hull.append(place)
    return hull


def _is_above(left: Choice, middle: Choice, right: Choice) -> bool:
    """Check whether ``middle`` lies on or above the line from ``left`` to ``right``."""
    rise = (right.error - left.error) * (middle.cost - left.cost)
    return (middle.error - left.error) * (right.cost - left.cost) >= rise


def _spend(fronts: Sequence[Sequence[Choice]], places: list[int], weights: Sequence[float], limit: float) -> None:
    while True:
        total = sum(front[place].cost for front, place in zip(fronts, places, strict=True))
        gains = []
        for layer, (front, place) in enumerate(zip(fronts, places, strict=True)):
            if place + 1 < len(front):
                here, there = front[place], front[place + 1]
                if total - here.cost + there.cost <= limit:
                    gains.append((weights[layer] * (here.error - there.error) / (there.cost - here.cost), -layer))
        if not gains:
            return
        places[-max(gains)[1]] += 1
