"""What is known about an exported file: written beside it as JSON, and carried by the callback."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_light.export.parity import Parity, Tolerance
from lightning_light.export.top1 import Top1
from lightning_light.measure import LatencyStats

__all__ = ["ExportReport"]


@dataclass(frozen=True)
class ExportReport:
    """One exported file, as it was when it was written.

    Attributes:
        file: its path.
        exporter: the exporter that wrote it, as a user would write it.
        runtime: what ran it for ``parity`` and ``latency``.
        bytes: size of the file.
        deflated_bytes: size of the file after DEFLATE, as in an app package.
        params: parameters of the model; the file may have fewer, folded into others.
        macs: multiply-accumulates for one sample, of the model.
        latency: seconds for one sample on this machine's CPU, and the number of threads.
        parity: how close the file came to the model.
        parity_batches: how many of the compared batches were real ones; with 0 it was the example input alone.
        tolerance: how close it had to come.
        inputs: name, shape and type of each tensor that the file takes, in order.
        built_in: arguments that are no tensors, and have become part of the file.
        batch: ``any`` size, ``one`` sample, or inputs ``as_given``.
        details: what the exporter adds.
        top1: of an int8 file: the classes that it tells, over the whole validation; None if they are not known.
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
    top1: Top1 | None = None

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> ExportReport:
        """Read what `write` has written."""
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        values = {"latency": LatencyStats, "parity": Parity, "tolerance": Tolerance}
        top1 = None if found.get("top1") is None else Top1(**found["top1"])
        return cls(**{**found, **{name: kind(**found[name]) for name, kind in values.items()}, "top1": top1})

    def summary(self) -> str:
        """The report in a line.

        Example:
            >>> import tempfile
            >>> from lightning_light.export import export_model
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     report = export_model(model, (torch.randn(1, 3, 8, 8),), f"{folder}/model.ptl")
            >>> print(report.summary())
            /...model.ptl: ... kB, ... ms a sample (median of 50, 1 thread), off by at most ... on 4 samples, the...
        """
        threads = f"{self.latency.threads} thread{'s' if self.latency.threads > 1 else ''}"
        return (
            f"{self.file}: {self.bytes / 1000:.1f} kB, {self.latency.median * 1000:.3g} ms a sample "
            f"(median of {self.latency.runs}, {threads}), off by at most {self.parity.max_absolute:.1e} "
            f"on {self.parity.samples} samples{'' if self.parity_batches else ', the example input only'}"
            f"{self._of_int8()}"
        )

    def _of_int8(self) -> str:
        steps = [f"{name} {off:.3g} steps" for name, off in self.parity.steps.items()]
        told = [self.top1.summary()] if self.top1 else []
        left = [f"left float: {', '.join(found)}"] if (found := self.details.get("left_float")) else []
        never = [f"never int8: {', '.join(found)}"] if (found := self.details.get("never_int8")) else []
        return "".join(f"; {part}" for part in [*steps, *told, *left, *never])
