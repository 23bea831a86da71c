"""Report of an exported file, written beside it as JSON."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from typing_extensions import override

from lightning_light.atomic import atomic_write
from lightning_light.export.evaluation import Evaluation, MetricComparison
from lightning_light.export.parity import Parity, Tolerance
from lightning_light.formatting import DataTable, Tabular, human_bytes, plural
from lightning_light.measure import LatencyStats

__all__ = ["ExportReport"]


@dataclass(frozen=True)
class ExportReport(Tabular):
    """Size, latency, parity and metrics of one exported file.

    Attributes:
        file: its path.
        exporter: the exporter that wrote it, as a user writes it.
        runtime: the runtime of ``parity``, ``latency`` and ``evaluation``.
        bytes: size of the file.
        deflated_bytes: size of the file after DEFLATE, as in an app package.
        params: parameters of the model; the file may have fewer, folded into others.
        macs: multiply-accumulates for one sample, of the model.
        latency: seconds for one sample on this machine's CPU, and the number of threads.
        parity: differences between the outputs of the file and of the model.
        parity_batches: number of real batches among those compared; 0 if it was the example input alone.
        tolerance: maximum differences.
        inputs: name, shape and type of each input tensor of the file, in order.
        built_in: arguments that are not tensors and have become constants of the file.
        batch: ``any`` size, ``one`` sample, or inputs ``as_given``.
        details: what the exporter adds.
        evaluation: metrics of the model and of the file; None if none were computed.
    """

    file: str
    exporter: str
    runtime: str
    bytes: int
    deflated_bytes: int
    params: int
    macs: int
    latency: LatencyStats
    parity: Parity
    parity_batches: int
    tolerance: Tolerance
    inputs: list[dict[str, Any]]
    built_in: dict[str, str]
    batch: str
    details: dict[str, Any] = field(default_factory=dict)
    evaluation: Evaluation | None = None

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON."""
        with atomic_write(os.fspath(path)) as part:
            part.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> ExportReport:
        """Read a report that `write` has written."""
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        values = {"latency": LatencyStats, "parity": Parity, "tolerance": Tolerance}
        evaluation = None
        if (saved := found.get("evaluation")) is not None:
            metrics = {name: MetricComparison(**value) for name, value in saved["metrics"].items()}
            evaluation = Evaluation(**{**saved, "metrics": metrics})
        parts = {name: kind(**found[name]) for name, kind in values.items()}
        return cls(**{**found, **parts, "evaluation": evaluation})

    def summary(self) -> str:
        """Return the report in one line.

        Example:
            >>> import tempfile
            >>> from lightning_light.export import export_model
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     report = export_model(model, (torch.randn(1, 3, 8, 8),), f"{folder}/model.ptl")
            >>> print(report.summary())
            /...model.ptl: ... kB, ... ms per sample (median of 50, 1 thread), differs by at most ... on 5 samples...
        """
        threads = f"{self.latency.threads} thread{'s' if self.latency.threads > 1 else ''}"
        return (
            f"{self.file}: {self.bytes / 1000:.1f} kB, {self.latency.median * 1000:.3g} ms per sample "
            f"(median of {self.latency.runs}, {threads}), differs by at most {self.parity.max_absolute:.1e} "
            f"on {self.parity.samples} samples{'' if self.parity_batches else ', the example input only'}"
            f"{self._notes()}"
        )

    @override
    def tables(self) -> list[DataTable]:
        """Return one line per quantity."""
        lines = (
            ("file", self.file),
            ("runtime", self.runtime),
            ("size", human_bytes(self.bytes)),
            ("latency per sample", f"{1e3 * self.latency.median:.3g} ms, {plural(self.latency.threads, 'thread')}"),
            ("largest difference", f"{self.parity.max_absolute:.1e} on {plural(self.parity.samples, 'sample')}"),
            *([("metrics", self.evaluation.summary())] if self.evaluation else []),
        )
        return [DataTable(("", "exported"), lines, text_columns=frozenset({"exported"}))]

    def _notes(self) -> str:
        steps = [f"{name} {off:.3g} quantization steps" for name, off in self.parity.quant_steps.items()]
        metrics = [summary] if self.evaluation and (summary := self.evaluation.summary()) else []
        left = [f"left float: {', '.join(found)}"] if (found := self.details.get("left_float")) else []
        never = [f"never int8: {', '.join(found)}"] if (found := self.details.get("never_int8")) else []
        return "".join(f"; {part}" for part in [*steps, *metrics, *left, *never])
