"""Rows of the page: experiments and the results of their seeds."""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.experiments.table import EXPERIMENTS, Experiment

AXES = {
    "macs": "MACs, share of the dense network",
    "deflated": "compressed file, share of the dense network",
    "latency": "latency of the file, share of the dense network",
}


@dataclass(frozen=True)
class Row:
    """An experiment and the results of its seeds."""

    experiment: Experiment
    results: list[dict[str, Any]]

    def values(self, *keys: str) -> list[float]:
        """Return a quantity of every seed."""
        return [_at(result, keys) for result in self.results]

    def accuracies(self) -> dict[int, float]:
        """Return the accuracy by seed."""
        return {result["settings"]["seed"]: result["accuracy"] for result in self.results}

    def share(self, quantity: str) -> float | None:
        """Return the mean share of the dense network's ``quantity``, one of `AXES`, ``"params"`` or ``"bytes"``."""
        if quantity in ("macs", "params"):
            return mean(result[quantity] / result["dense"][quantity] for result in self.results)
        if any(result["file"] is None for result in self.results):
            return None
        if quantity == "latency":
            return mean(self.values("file", "latency", "ratio"))
        return mean(result["file"][quantity] / result["dense"][quantity] for result in self.results)

    @property
    def gain(self) -> float:
        """Mean difference of accuracy to the starting weights."""
        return mean(result["accuracy"] - result["dense"]["accuracy"] for result in self.results)

    def cells(self) -> list[str]:
        """Return the line of the table."""
        has_file = self.share("bytes") is not None
        file = [_kilobytes(self.values("file", size)) for size in ("bytes", "deflated")] if has_file else ["-", "-"]
        return [
            f'<a id="{self.experiment.name}"></a>{self.experiment.title}',
            self.experiment.package,
            _percent(self.values("accuracy")),
            str(len(self.results)),
            f"{100 * self.gain:+.2f}",
            f"{self.share('macs'):.3f}",
            f"{self.share('params'):.3f}",
            f"{mean(self.values('sparsity')):.2f}",
            *file,
            f"{self.share('latency'):.2f}" if has_file else "-",
            f"{mean(self.values('training_seconds')):.0f} s",
        ]


def read(folder: Path) -> list[Row]:
    """Return the rows that have results, in the order of the table."""
    rows = []
    for experiment in EXPERIMENTS:
        files = sorted(folder.glob(f"{experiment.name}-[0-9].json"))  # fewer than ten seeds
        if files:
            rows.append(Row(experiment, [json.loads(file.read_text()) for file in files]))
    return rows


def _kilobytes(values: list[float]) -> str:
    return f"{mean(values) / 1e3:.0f} kB"


def _percent(values: list[float]) -> str:
    spread = f" ± {100 * stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.2f}{spread} %"


def _at(result: dict[str, Any], keys: tuple[str, ...]) -> Any:
    for key in keys:
        result = result[key]
    return result
