"""Choose items with the least total score within several limits at once, exactly, by integer programming."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

__all__ = ["choose_items"]

_LARGEST = 1e4  # of the scores that the solver is given


def choose_items(
    scores: Sequence[float],
    costs: Sequence[Sequence[float]],
    limits: Sequence[float],
    *,
    exclusive: Sequence[Collection[int]] = (),
    excluded: Sequence[Collection[int]] = (),
    near: tuple[Collection[int], int] | None = None,
) -> list[int] | None:
    """Choose the items with the least sum of scores whose costs stay within the limits.

    Solved exactly by HiGHS: Huangfu and Hall, 2018, "Parallelizing the dual revised simplex method",
    https://arxiv.org/abs/1503.01889.

    Args:
        scores: one per item.
        costs: for each limit one cost per item; negative where an item saves.
        limits: largest sum of each cost over the chosen items.
        exclusive: sets of items of which at most one is chosen.
        excluded: solutions that are not returned again.
        near: a solution, and the number of items that may differ from it, removed and added ones counted alike.

    Returns:
        Ascending indices of the chosen items; None if there is no solution.

    Example:
        >>> choose_items([1.0, 3.0, 1.5], [[-2.0, -5.0, -3.0]], [-4.0])
        [0, 2]
        >>> choose_items([1.0, 3.0, 1.5], [[-2.0, -5.0, -3.0]], [-4.0], exclusive=[{0, 2}])
        [1]
    """
    count = len(scores)
    rows: list[NDArray[np.float64]] = []
    highs: list[float] = []

    def add(row: NDArray[np.float64], high: float) -> None:
        scale = max(float(np.abs(row).max(initial=0.0)), abs(high)) or 1.0  # the solver's tolerances are absolute
        rows.append(row / scale)
        highs.append(high / scale)

    for row, limit in zip(costs, limits, strict=True):
        add(np.asarray(row, dtype=np.float64), limit)
    for group in exclusive:
        add(_indicator(group, count), 1.0)
    for old in excluded:
        add(2.0 * _indicator(old, count) - 1.0, len(old) - 1.0)
    if near is not None:
        add(1.0 - 2.0 * _indicator(near[0], count), near[1] - len(near[0]))
    if not count:
        return [] if all(high >= 0.0 for high in highs) else None
    objective = np.asarray(scores, dtype=np.float64)
    objective = objective / (np.abs(objective).max() or 1.0) * _LARGEST  # the solver stops at an absolute gap of 1e-6
    constraints = [LinearConstraint(np.stack(rows), -np.inf, np.asarray(highs))] if rows else []
    found = milp(
        objective,
        integrality=np.ones(count),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    return None if found.x is None else [int(index) for index in np.flatnonzero(found.x > 0.5)]


def _indicator(items: Collection[int], count: int) -> NDArray[np.float64]:
    row = np.zeros(count)
    row[list(items)] = 1.0
    return row
