"""The table of a search: what each item does to the outputs and to the costs, saved after every entry."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from lightning_light.atomic import atomic_write
from lightning_light.formatting import DataTable, Tabular, human_count, short_names
from lightning_light.nas.choices import Item
from lightning_light.nas.costs import Costs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SearchTable", "savings_of", "total"]

_COLORS = {"blocks": "#081d58", "channels": "#1d91c0", "ranks": "#d95f0e", "operators": "#993404"}
_STORED = ("distances", "shapes", "savings", "costs", "files")


@dataclass
class SearchTable(Tabular):
    """Scores and costs of every item alone, and the costs of the network as it is.

    Attributes:
        digest: of weights, batches, budgets and runtimes; entries of another digest are not used again.
        items: the choices.
        distances: name of an item -> distance of the outputs.
        shapes: name of an item -> digest of the shapes that it leaves; items of equal shapes have equal costs.
        savings: name of an item -> quantity -> what it takes off.
        costs: quantity -> value of the network as it is, as the file is written.
        files: names of the items of a whole network -> what was measured on its file.
        path: of the file; None to keep the table in memory.
    """

    digest: str
    items: list[Item]
    distances: dict[str, float] = field(default_factory=dict)
    shapes: dict[str, str] = field(default_factory=dict)
    savings: dict[str, Costs] = field(default_factory=dict)
    costs: Costs = field(default_factory=dict)
    files: dict[str, Costs] = field(default_factory=dict)
    path: Path | None = None

    @classmethod
    def open(cls, call: str, path: Path | None, digest: str, items: Sequence[Item]) -> SearchTable:
        """Return the table stored at ``path`` if its digest is the same, else an empty one.

        Raises:
            ValueError: the table there is of another space.
        """
        table = cls(digest, list(items), path=path)
        if path is None or not path.exists():
            return table
        try:
            stored: dict[str, Any] = json.loads(path.read_text())
            names, found = list(stored["items"]), str(stored["digest"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"`{call}(table={str(path)!r})`: expected a table of a search, found a file that is none "
                f"({type(error).__name__}: {error}). Give another path."
            ) from error
        if names != [item.name for item in items]:
            different = sorted({*names} ^ {item.name for item in items})
            raise ValueError(
                f"`{call}(table={str(path)!r})`: expected a table of this space ({len(items)} items), found one of "
                f"another ({len(names)} items; different: {', '.join(different[:3])}). Give another path, or delete "
                "the file."
            )
        if found == digest:
            for name in _STORED:
                setattr(table, name, stored.get(name, {}))
        return table

    def save(self) -> None:
        """Write the table to its file, if it has one."""
        if self.path is None:
            return
        stored = {name: getattr(self, name) for name in ("digest", *_STORED)}
        with atomic_write(self.path) as part:
            part.write_text(json.dumps({"items": [item.name for item in self.items], **stored}, indent=1))

    def table(self, chosen: Iterable[Item] = ()) -> DataTable:
        """Return the table for people: a line per item, with what it saves of each quantity in percent."""
        names = {item.name for item in chosen}
        quantities = list(self.costs)
        lines = [
            (
                item.target,
                f"{item.kind} {item.choice}",
                f"{self.distances[item.name]:.3g}" if item.name in self.distances else "",
                *(_percent(self.savings.get(item.name, {}).get(q), self.costs[q]) for q in quantities),
                "chosen" if item.name in names else "",
            )
            for item in self.items
        ]
        headers = ("target", "choice", "distance", *(f"{quantity} saved" for quantity in quantities), "solution")
        notes = (f"network as it is: {', '.join(f'{q} {human_count(v)}' for q, v in self.costs.items())}",)
        return DataTable(headers, tuple(lines), notes=notes, text_columns=frozenset({"choice", "solution"}))

    @override
    def tables(self) -> list[DataTable]:
        """Return one line per item."""
        return [self.table()]

    def figure(self, quantity: str) -> Figure:
        """Draw what each item saves of ``quantity``, and how far the outputs are then.

        Raises:
            UnsupportedError: matplotlib is not installed.
        """
        from lightning_light.report.figures import new_figure

        figure = new_figure("SearchTable.figure", 8, 5)
        axes = figure.subplots()
        for kind in dict.fromkeys(item.kind for item in self.items):
            mine = [item for item in self.items if item.kind == kind and item.name in self.savings]
            saved = [self.savings[item.name][quantity] / self.costs[quantity] for item in mine]
            distances = [max(self.distances[item.name], 1e-6) for item in mine]
            axes.scatter(saved, distances, s=18, label=kind, color=_COLORS.get(kind))
            names = short_names([item.target for item in mine])
            for x, y, name in zip(saved, distances, names, strict=True):
                axes.annotate(name, (x, y), fontsize=5, xytext=(3, 0), textcoords="offset points", va="center")
        axes.set_yscale("log")
        axes.set_xlabel(f"{quantity} saved")
        axes.set_ylabel("distance of the outputs")
        axes.xaxis.set_major_formatter(lambda fraction, _: f"{fraction:.0%}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        return figure


def total(costs: Mapping[str, float], savings: Iterable[Costs]) -> Costs:
    """Return ``costs`` without ``savings``."""
    savings = list(savings)
    return {quantity: value - sum(saved[quantity] for saved in savings) for quantity, value in costs.items()}


def savings_of(table: SearchTable, costs: Costs) -> Costs:
    """Return what a network of these costs saves against the network as it is."""
    return {quantity: table.costs[quantity] - value for quantity, value in costs.items()}


def _percent(saved: float | None, value: float) -> str:
    return "" if saved is None else f"{100 * saved / value:.1f} %"
