"""The contents of a report, in plain types that JSON holds, and its tables."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from typing_extensions import override

from lightning_light.event_log import event_text
from lightning_light.formatting import DataTable, Tabular, human_bytes, human_count, human_milliseconds, human_percent
from lightning_light.measure import Snapshot, compression_table
from lightning_light.measure.history import History, with_sequences
from lightning_light.report.figures import has_matplotlib, run_figure, svg

__all__ = ["Curve", "RunReport", "curves_of", "export_reports"]

Curve = list[tuple[int, float]]
"""(optimizer step, value)."""


@dataclass(frozen=True)
class RunReport(Tabular):
    """A network before and after compression, and how it came about.

    Attributes:
        before: the network at the start of the first fit.
        after: the network at the end.
        history: what remained of each layer over the steps; None where it was not recorded.
        metrics: name -> value after each validation.
        events: what methods did, in order: ``step``, ``epoch``, ``method``, ``summary``, maybe ``part``.
        exports: the reports of the exported files, as `lightning_light.export.ExportReport` writes them.
        methods: the callbacks, as a user writes them.
        environment: versions, machine, threads, seed and command of the run, and its peak memory in bytes.
        baseline: another report, in plain types, of which metrics and files stand in the column "before".
    """

    before: Snapshot
    after: Snapshot
    history: History | None = None
    metrics: Mapping[str, Curve] = field(default_factory=dict)
    events: tuple[dict[str, Any], ...] = ()
    exports: tuple[dict[str, Any], ...] = ()
    methods: tuple[str, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    baseline: Mapping[str, Any] | None = None

    def plain(self) -> dict[str, Any]:
        """Return plain types, for JSON."""
        history = None if self.history is None else self.history.plain()
        parts = {"before": self.before.plain(), "after": self.after.plain(), "history": history}
        return {name: with_sequences(value, list) for name, value in {**vars(self), **parts}.items()}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> RunReport:
        """Restore what `plain` returned."""
        parts: dict[str, Any] = {name: Snapshot.from_plain(plain[name]) for name in ("before", "after")}
        parts |= {name: tuple(plain[name]) for name in ("events", "exports", "methods")}
        history = None if plain["history"] is None else History.from_plain(plain["history"])
        return cls(**{**plain, **parts, "history": history, "metrics": curves_of(plain["metrics"])})

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON."""
        Path(path).write_text(json.dumps(self.plain(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> RunReport:
        """Read a report that `write` has written."""
        return cls.from_plain(json.loads(Path(path).read_text(encoding="utf-8")))

    def summary_table(self) -> DataTable:
        """Return the table of metrics, costs and files, before and after."""
        then, now = self._metrics_before(), {name: curve[-1][1] for name, curve in self.metrics.items() if curve}
        lines = [(name, _number(then.get(name)), _number(value), "") for name, value in now.items()]
        for name, shown, had, has in (
            ("MACs per sample", human_count, self.before.macs, self.after.macs),
            ("parameters", human_count, self.before.params, self.after.params),
            ("bit operations (BOPs)", human_count, self.before.bops, self.after.bops),
            ("stored size", human_bytes, self.before.bytes, self.after.bytes),
        ):
            if had is not None and has is not None:
                lines.append((name, shown(had), shown(has), human_percent(has / had) if had else ""))
        for name, part in (("sparsity", "sparsity"), ("bits per weight", "bits")):
            had, has = getattr(self.before, part), getattr(self.after, part)
            shown = human_percent if part == "sparsity" else _number
            lines.append((name, shown(had), shown(has), ""))
        known = {export["runtime"]: export for export in (self.baseline or {}).get("exports", [])}
        for export in self.exports:
            lines += _file_lines(export, known.get(export["runtime"]))
        for name, peak in self.environment.get("peak_memory", {}).items():
            lines.append((f"peak memory of the run ({name})", "", human_bytes(peak), ""))
        return DataTable(("", "before", "after", "remaining"), tuple(lines))

    def layer_table(self) -> DataTable:
        """Return the table of every layer before and after."""
        return compression_table(self.before, self.after, title=None)

    def export_table(self) -> DataTable:
        """Return the table of the exported files: size, latency, and agreement with the module."""
        headers = ("file", "runtime", "size", "latency per sample", "p10 to p90", "threads")
        return DataTable(
            (*headers, "largest difference", "equal top-1"),
            tuple(_export_line(export) for export in self.exports),
            text_columns=frozenset({"runtime"}),
        )

    def event_table(self) -> DataTable:
        """Return the table of what methods did, in words."""
        lines = tuple((str(event["step"]), str(event["epoch"]), event_text(event)) for event in self.events)
        return DataTable(("step", "epoch", "event"), lines, text_columns=frozenset({"event"}))

    def _metrics_before(self) -> dict[str, float]:
        """Return the metrics of the baseline, else of the last validation before the first event."""
        if self.baseline is not None:
            return {name: curve[-1][1] for name, curve in self.baseline["metrics"].items() if curve}
        first = self.events[0]["step"] if self.events else 0
        earlier = {name: [value for step, value in curve if step <= first] for name, curve in self.metrics.items()}
        return {name: values[-1] for name, values in earlier.items() if values}

    @override
    def tables(self) -> list[DataTable]:
        """Return the tables of metrics and costs, and of the layers."""
        return [self.summary_table(), self.layer_table()]

    def picture(self) -> str:
        """Return costs, metrics in [0, 1] and layers over the run as SVG; nothing where they were not recorded.

        Behind each metric is that of the baseline.
        """
        if self.history is None or not self.history.layers or not self.history.steps:
            return ""
        dense, shown = curves_of((self.baseline or {}).get("metrics", {})), dict[str, Curve]()
        for name, curve in self.metrics.items():
            if all(0 <= value <= 1 for _, value in curve):
                shown |= {name: curve} | ({f"{name} (baseline)": dense[name]} if name in dense else {})
        return svg(run_figure(self.history, shown))

    @override
    def _repr_html_(self) -> str:
        """Return the tables, and the picture where matplotlib is installed."""
        drawn = self.picture() if has_matplotlib() else ""
        return drawn + super()._repr_html_()


def curves_of(plain: Mapping[str, Iterable[Any]]) -> dict[str, Curve]:
    """Restore curves from lists of two numbers per point."""
    return {name: [(step, value) for step, value in points] for name, points in plain.items()}


def export_reports(callbacks: Iterable[object]) -> list[dict[str, Any]]:
    """Return the reports of the files that the callbacks of a run have exported, in plain types."""
    reports: list[Any] = [getattr(callback, "report", None) for callback in callbacks]
    return [asdict(each) for each in reports if is_dataclass(each) and not isinstance(each, type)]


def _file_lines(export: Mapping[str, Any], dense: Mapping[str, Any] | None) -> list[tuple[str, str, str, str]]:
    name = Path(export["file"]).name
    size, latency = export["bytes"], export["latency"]["median"]
    if dense is None:
        return [(f"{name}: size", "", human_bytes(size), ""), (f"{name}: latency", "", human_milliseconds(latency), "")]
    had, took = dense["bytes"], dense["latency"]["median"]
    return [
        (f"{name}: size", human_bytes(had), human_bytes(size), human_percent(size / had)),
        (f"{name}: latency", human_milliseconds(took), human_milliseconds(latency), human_percent(latency / took)),
    ]


def _export_line(export: Mapping[str, Any]) -> tuple[str, ...]:
    latency, evaluation = export["latency"], export["evaluation"] or {}
    return (
        Path(export["file"]).name,
        export["runtime"],
        human_bytes(export["bytes"]),
        human_milliseconds(latency["median"]),
        f"{human_milliseconds(latency['p10'])} to {human_milliseconds(latency['p90'])}",
        str(latency["threads"]),
        f"{export['parity']['max_absolute']:.1e}",
        _number(evaluation.get("top1_agreement")),
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
