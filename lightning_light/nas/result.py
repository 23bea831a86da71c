"""The result of a search."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_light.formatting import human_count, human_percent, layer_lines
from lightning_light.nas.choices import Item
from lightning_light.nas.costs import Costs
from lightning_light.nas.evaluation import Score
from lightning_light.nas.table import SearchTable

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
        evaluated: how many whole networks were compared.
    """

    items: tuple[Item, ...]
    quantized: bool
    table: SearchTable
    goals: Costs
    predicted: Costs
    measured: Costs
    score: Score
    evaluated: int

    def lines(self) -> list[str]:
        """Return one line per target that is changed."""
        return [f"{item.target}: {item.kind} {item.choice}" for item in self.items]

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
        return layer_lines(self.lines(), self.summary()).html()
