"""Find the assignment: exact for a sum of scores, then improved by evaluations of whole networks around it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_light.errors import BudgetError
from lightning_light.integer_program import choose_items
from lightning_light.nas.choices import Item
from lightning_light.nas.costs import Costs, Meter
from lightning_light.nas.evaluation import Evaluator, Score
from lightning_light.nas.table import SearchTable, total
from lightning_light.progress_bar import with_progress_bar
from lightning_light.quantization import Recipe

__all__ = ["Candidate", "Solver"]

Scores = NDArray[np.float64]

_SCORES: tuple[Callable[[Scores], Scores], ...] = (lambda d: d, np.sqrt, lambda d: d**0.75)
_SPREAD, _SPREAD_NEAR, _CHANGES_NEAR = 0.7, 0.5, 6  # the last: three items replaced by three others
_OTHER_KIND = 1e3  # so much dearer are the other kinds, where the solution of one kind alone is wanted
_BROKEN = 1e3  # distance of outputs that are not finite
_CORRECTIONS, _ROUNDS, _TOLERANCE, _ROUNDING = 8, 6, 0.05, 1e-9


@dataclass(frozen=True)
class Candidate:
    """A whole network that was compared with the network as it is.

    Attributes:
        items: that are carried out.
        score: of the whole network.
        costs: quantity -> value of the whole network, counted; those of a file are predicted, measured where it was
            written.
    """

    items: tuple[Item, ...]
    score: Score
    costs: Costs


class Solver:
    """Choose items from a full table.

    Args:
        call: the function or callback, for messages.
        table: scores and costs of every item alone.
        evaluator: evaluates whole networks.
        meter: measures their costs.
        goals: quantity -> largest value.
        recipe: of the int8 file; None for a float file.
        seed: of the candidates around the first solutions.

    Attributes:
        evaluated: the whole networks whose outputs were compared, in order.
    """

    def __init__(
        self,
        call: str,
        table: SearchTable,
        evaluator: Evaluator,
        meter: Meter,
        goals: Mapping[str, float],
        recipe: Recipe | None,
        seed: int,
    ) -> None:
        self._call, self._table, self._evaluator, self._meter = call, table, evaluator, meter
        self._goals, self._recipe, self._seed = dict(goals), recipe, seed
        self._limits = dict(goals)  # lower than the goals where measured files are above what was predicted
        distances = np.array([table.distances[item.name] for item in table.items])
        self._distances = np.nan_to_num(distances, nan=_BROKEN, posinf=_BROKEN).clip(min=0.0)
        self._costs = {q: [-table.savings[item.name][q] for item in table.items] for q in goals}
        layers = {layer for item in table.items for layer in item.layers}
        self._exclusive = [{i for i, item in enumerate(table.items) if layer in item.layers} for layer in layers]
        self._known: dict[frozenset[int], Candidate] = {}
        self._refused: list[frozenset[int]] = []
        self.evaluated: list[Candidate] = []

    def predicted(self, items: Sequence[Item]) -> Costs:
        """Return the costs of the network as it is without what the items save alone."""
        return total(self._table.costs, [self._table.savings[item.name] for item in items])

    def check_reachable(self) -> None:
        """Refuse goals that no assignment meets.

        Raises:
            BudgetError: names a value that can be reached.
        """
        for quantity, goal in self._goals.items():
            least = self._least(quantity, {})
            if least > goal * (1.0 + _ROUNDING):
                raise BudgetError(
                    f"`{self._call}(...)` cannot reach the budget: expected {quantity} <= {goal:.6g}, found "
                    f"{least:.6g} with the cheapest of all assignments ({self._table.costs[quantity]:.6g} as it is). "
                    "Add choices to `space`, smaller fractions or wider `targets`, or give a milder budget."
                )
        met: dict[str, float] = {}
        for quantity, goal in self._goals.items():
            if (least := self._least(quantity, met)) > goal * (1.0 + _ROUNDING):
                raise BudgetError(
                    f"`{self._call}(...)` cannot meet its budgets together: expected {quantity} <= {goal:.6g}, found "
                    f"{least:.6g} where {_written(met, ' <= ')}. Relax one of them, or add choices to `space`."
                )
            met[quantity] = goal

    def solve(self, evaluations: int, *, progress_bar: bool) -> Candidate:
        """Return the best solution found.

        The sum of scores is minimized exactly for the distance, its square root and its power of 3/4, and for each kind
        alone; of these, and of ``evaluations`` candidates from disturbed scores, the whole network whose outputs change
        least is taken. A file is then written and measured; where it is above a goal, the limit is lowered by as much
        and another is taken.

        Raises:
            BudgetError: no candidate meets the goals.
        """
        generator = np.random.default_rng(self._seed)
        for score in _SCORES:
            self._try(score(self._distances))
        kinds = [item.kind for item in self._table.items]
        alone = [{item.kind for item in one.items} for one in self._known.values()]
        for kind in (kind for kind in dict.fromkeys(kinds) if {kind} not in alone):
            others = [_OTHER_KIND if one != kind else 1.0 for one in kinds]
            self._try(np.sqrt(self._distances) * np.array(others))
        steps = range(evaluations if self._known and self._best().items else 0)
        for step in with_progress_bar(steps, len(steps), "whole networks", shown=progress_bar):
            near = step >= evaluations // 2
            noise = generator.normal(0.0, _SPREAD_NEAR if near else _SPREAD, len(self._distances))
            best = frozenset(self._table.items.index(item) for item in self._best().items)
            self._try(np.sqrt(self._distances) * np.exp(noise), (best, _CHANGES_NEAR) if near else None)
        return self._verified()

    def _verified(self) -> Candidate:
        """Measure the file of the best candidate; take another while it is above a goal."""
        found: list[tuple[float, Candidate]] = []
        for _ in range(_ROUNDS):
            if not self._known:
                break
            best = self._best()
            measured = {**best.costs, **self._file_costs(best.items)}
            best = Candidate(best.items, self._final_score(best), measured)
            excess = {q: measured[q] / goal for q, goal in self._goals.items()}
            found.append((max(excess.values()), best))
            if found[-1][0] <= 1.0 + _ROUNDING:
                return best
            self._refused += [key for key, one in self._known.items() if one.items == best.items]
            for quantity, ratio in excess.items():
                self._limits[quantity] /= max(ratio, 1.0)
            self._known = {key: one for key, one in self._known.items() if self._is_within(one)}
            self._try(np.sqrt(self._distances))
        nearest = min(found, key=lambda pair: pair[0], default=None)
        if nearest is None or nearest[0] > 1.0 + _TOLERANCE:
            raise BudgetError(
                f"`{self._call}(...)`: expected an assignment that meets {_written(self._goals, ' <= ')}, found none "
                f"among the evaluated ones{f'; the nearest has {_written(nearest[1].costs)}' if nearest else ''}. Give "
                "a milder budget, or add choices to `space`."
            )
        return nearest[1]

    def _final_score(self, candidate: Candidate) -> Score:
        """Score the network as it is written."""
        if self._recipe is None:
            return candidate.score
        return self._evaluator.score(self._evaluator.changed(candidate.items, self._recipe), self._recipe)

    def _file_costs(self, items: tuple[Item, ...]) -> Costs:
        """Measure a file once: an interrupted search that continues decides by the same values."""
        key = "; ".join(item.name for item in items)
        if self._meter.of_file and key not in self._table.files:
            self._table.files[key] = self._meter.measure(partial(self._evaluator.changed, items, self._recipe))
            self._table.save()
        return self._table.files.get(key, {})

    def _is_within(self, candidate: Candidate) -> bool:
        predicted = self.predicted(candidate.items)
        refused = any(candidate.items == self._items(one) for one in self._refused)
        return not refused and all(predicted[quantity] <= limit for quantity, limit in self._limits.items())

    def _items(self, indices: Iterable[int]) -> tuple[Item, ...]:
        return tuple(self._table.items[index] for index in sorted(indices))

    def _best(self) -> Candidate:
        return min(self._known.values(), key=lambda candidate: candidate.score.loss)

    def _try(self, scores: Scores, near: tuple[frozenset[int], int] | None = None) -> None:
        """Evaluate the solution for ``scores``; where its counted costs exceed a goal, lower the limit and repeat.

        Savings of neighbouring layers overlap, so that the whole saves less than the sum.
        """
        limits = dict(self._limits)
        for _ in range(_CORRECTIONS):
            found = self._choose(scores, limits, near)
            if found is None:
                return
            items = self._items(found)
            network = self._evaluator.changed(items)
            counted = self._meter.count(network)
            over = {
                q: value - self._goals[q] for q, value in counted.items() if value > self._goals[q] * (1 + _ROUNDING)
            }
            if not over:
                costs = {**self.predicted(items), **counted}
                self._known[found] = Candidate(items, self._evaluator.score(network), costs)
                self.evaluated.append(self._known[found])
                return
            self._refused.append(found)
            del network  # before the next one is made
            limits = {quantity: limit - over.get(quantity, 0.0) for quantity, limit in limits.items()}

    def _choose(
        self,
        scores: Any,
        limits: Mapping[str, float],
        near: tuple[frozenset[int], int] | None = None,
        excluded: Collection[frozenset[int]] = (),
    ) -> frozenset[int] | None:
        found = choose_items(
            list(scores),
            [self._costs[quantity] for quantity in limits],
            [limit - self._table.costs[quantity] for quantity, limit in limits.items()],
            exclusive=self._exclusive,
            excluded=[*self._known, *self._refused, *excluded],
            near=near,
        )
        return None if found is None else frozenset(found)

    def _least(self, quantity: str, limits: Mapping[str, float]) -> float:
        """Return the least value of a quantity within the limits that was found: counted if possible, else predicted.

        The sum of savings is exact only for layers that are no neighbours: a few of the best sums are counted.
        """
        least, seen = np.inf, list[frozenset[int]]()
        while (
            len(seen) < _CORRECTIONS
            and (found := self._choose(self._costs[quantity], limits, excluded=seen)) is not None
        ):
            items = self._items(found)
            if quantity in self._meter.of_file:
                return self.predicted(items)[quantity]
            seen.append(found)
            least = min(least, self._meter.count(self._evaluator.changed(items))[quantity])
            if least <= self._goals[quantity]:
                break
        return least


def _written(costs: Mapping[str, float], sign: str = " ") -> str:
    return ", ".join(f"{quantity}{sign}{value:.6g}" for quantity, value in costs.items())
