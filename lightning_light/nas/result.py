"""The result of a search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_light.formatting import human_count, human_percent, layer_lines
from lightning_light.nas.choices import Item
from lightning_light.nas.costs import Costs
from lightning_light.nas.evaluation import Score
from lightning_light.nas.solver import Candidate
from lightning_light.nas.table import SearchTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SearchResult"]


@dataclass(frozen=True)
class SearchResult:
    """What a search has chosen.

    Attributes:
        items: the assignment: what is done to which target; the others stay.
        quantized: whether the costs are those of an int8 file.
        table: scores and costs of every choice alone.
        goals: quantity -> largest value.
        predicted: quantity -> value that the table predicts, for what is measured on a file: the sum of the savings of
            all items alone. It is too low where the savings of neighbouring layers overlap.
        measured: quantity -> value of the whole network, of the written file where there is a runtime.
        score: how far the outputs are from those of the network before, without training.
        evaluated: the whole networks that were compared, in order.
    """

    items: tuple[Item, ...]
    quantized: bool
    table: SearchTable
    goals: Costs
    predicted: Costs
    measured: Costs
    score: Score
    evaluated: tuple[Candidate, ...]

    def lines(self) -> list[str]:
        """Return one line per target that is changed."""
        return [item.name for item in self.items]

    def summary(self) -> str:
        """Return one line: the costs before, predicted and measured, and how many predictions change."""
        costs = [
            f"{quantity} {human_count(before)} → {human_count(self.measured[quantity])} "
            f"({self._predicted(quantity)}budget {human_count(self.goals[quantity])})"
            for quantity, before in self.table.costs.items()
        ]
        changed = f"{human_percent(self.score.changed)} of the predictions change before training"
        return f"{', '.join(costs)}; {changed}"

    def _predicted(self, quantity: str) -> str:
        found = self.predicted.get(quantity)
        return "" if found is None else f"predicted {human_count(found)}, "

    def __str__(self) -> str:
        return str(layer_lines(self.lines(), self.summary()))

    def _repr_html_(self) -> str:
        from lightning_light.report.figures import has_matplotlib, svg

        picture = svg(self.figure()) if has_matplotlib() else ""
        return layer_lines(self.lines(), self.summary()).html() + picture

    def figure(self, quantity: str | None = None) -> Figure:
        """Draw the evaluated networks: what they cost, and how many predictions change before training.

        The Pareto front is joined, the chosen network is marked. Where no classes are compared, the distance of the
        outputs is drawn.

        Args:
            quantity: a quantity of the budgets; None: the first one. That of a file is predicted, except of the chosen
                network.

        Raises:
            UnsupportedError: matplotlib is not installed.
            ValueError: there is no such quantity.
        """
        from lightning_light.report.figures import front_figure, least_of

        if quantity is not None and quantity not in self.goals:
            raise ValueError(f"`figure({quantity!r})`: expected one of the quantities {list(self.goals)}.")
        cost = quantity or next(iter(self.goals))
        by_class = any(one.score.changed for one in self.evaluated)

        def place(costs: Costs, score: Score) -> tuple[float, float]:
            return costs[cost], score.changed if by_class else score.distance

        points = [(self.table.costs[cost], 0.0), *(place(one.costs, one.score) for one in self.evaluated)]
        chosen = place(self.measured, self.score)
        labels = (cost, f"{'predictions changed' if by_class else 'distance of the outputs'}, before training")
        figure = front_figure([*points, chosen], least_of([*points, chosen]), labels, name="networks", chosen=chosen)
        figure.axes[0].axvline(self.goals[cost], color="#d95f0e", linewidth=0.8, linestyle=":")
        return figure
