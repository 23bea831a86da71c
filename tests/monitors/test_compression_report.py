"""Run real Trainers, and read the files of the report back."""

import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_light.budgets import MACs
from lightning_light.errors import UnsupportedError
from lightning_light.export import MobileExport
from lightning_light.measure import count_cost
from lightning_light.monitors import CompressionReport
from lightning_light.quantization import Int8, QuantizationAwareTraining
from lightning_light.report import RunReport, report_from_checkpoint
from lightning_light.schedules import Linear, OneShot, Window
from lightning_light.structured import StructuredPruning
from tests.surgery.runs import Events, Lit, Loader, trainer

EXAMPLE = torch.zeros(1, 3, 8, 8)


class Measured(Lit):
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


class Page(HTMLParser):
    """Collect the elements of a page and what they refer to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]


def test_a_report_has_the_figures_of_the_run(tmp_path: Path) -> None:
    module = Measured()
    dense = count_cost(module, (EXAMPLE,))
    export = MobileExport(tmp_path / "model.ptl", latency_runs=2)
    report = CompressionReport(tmp_path / "out" / "report.html")
    pruning = StructuredPruning(MACs(0.5), schedule=Window(Linear(), start=0.2, end=0.5))
    quantization = QuantizationAwareTraining(Int8(), start=0.6, calibration_batches=2)
    pl.seed_everything(7, verbose=False)
    trainer(pruning, quantization, export, report).fit(module, Loader())
    found = RunReport.read(tmp_path / "out" / "report.json")
    assert found == report.result
    pruned = count_cost(module, (EXAMPLE,))
    assert (found.before.macs, found.before.params, found.before.bits) == (dense.macs, dense.params, 32.0)
    assert (found.after.macs, found.after.params) == (pruned.macs, pruned.params)
    assert found.before.bops == 1024 * dense.macs
    assert found.after.bops == 64 * pruned.macs  # every layer with MACs is int8
    assert [len(curve) for curve in found.metrics.values()] == [3, 3]
    assert set(found.metrics) == {"val_accuracy", "val_loss"}
    assert found.exports[0]["bytes"] == (tmp_path / "model.ptl").stat().st_size
    assert found.events[0]["summary"].endswith("removed from 1 layer")
    assert found.environment["seed"] == "7"
    assert found.environment["packages"]["torch"] == torch.__version__
    page = (tmp_path / "out" / "report.html").read_text()
    parsed = Page(page)
    assert all(reference.startswith("#") for reference in parsed.references)
    assert not {"script", "link", "img", "iframe"} & set(parsed.tags)
    assert parsed.tags.count("svg") == 2
    lines = {line[0]: line[1:] for line in found.summary_table().lines}
    assert lines["MACs per sample"][2] == f"{pruned.macs / dense.macs:.1%}"
    before_first_event = [value for step, value in found.metrics["val_loss"] if step <= found.events[0]["step"]]
    assert lines["val_loss"][0] == (f"{before_first_event[-1]:.4g}" if before_first_event else "")
    for text in (
        "model.ptl",
        "TorchScript lite",
        repr(pruning),
        "quantization aware training: enabled",
        lines["val_loss"][1],
    ):
        assert text.replace("'", "&#x27;") in page
    assert f"{1e3 * found.exports[0]['latency']['median']:.3g} ms" in page


def test_a_resumed_run_reports_the_whole_and_a_checkpoint_gives_the_same_table(tmp_path: Path) -> None:
    def run(path: str, epochs: int, ckpt_path: Path | None = None) -> tuple[Any, Any]:
        report = CompressionReport(tmp_path / f"{path}.html")
        fit = trainer(Events(cuts=(2, 6)), report, max_epochs=epochs)
        fit.fit(Measured(), Loader(), ckpt_path=ckpt_path)
        fit.save_checkpoint(tmp_path / f"{path}.ckpt")
        return report.result, report_from_checkpoint(tmp_path / f"{path}.ckpt")

    whole, from_whole = run("whole", 3)
    run("half", 1)
    resumed, _ = run("resumed", 3, tmp_path / "half.ckpt")
    for part in ("before", "after", "history", "metrics", "events"):
        assert getattr(resumed, part) == getattr(whole, part) == getattr(from_whole, part), part
    assert from_whole.layer_table() == whole.layer_table()
    assert "8 → 2" in from_whole._repr_html_()


def test_a_baseline_is_the_column_before(tmp_path: Path) -> None:
    def run(name: str, *methods: Any, **options: Any) -> RunReport:
        report = CompressionReport(tmp_path / f"{name}.html", **options)
        export = MobileExport(tmp_path / f"{name}.ptl", latency_runs=2)
        trainer(*methods, export, report).fit(Measured(), Loader())
        assert report.result is not None
        return report.result

    dense = run("dense")
    pruned = run("pruned", StructuredPruning(MACs(0.4), schedule=OneShot(at=0.3)), baseline=tmp_path / "dense.json")
    lines = {line[0]: line[1:] for line in pruned.summary_table().lines}
    assert lines["val_loss"][0] == f"{dense.metrics['val_loss'][-1][1]:.4g}"
    size = dense.exports[0]["bytes"], pruned.exports[0]["bytes"]
    assert size[1] < size[0]
    assert lines["pruned.ptl: size"][2] == f"{size[1] / size[0]:.1%}"


def test_a_missing_library_or_a_wrong_path_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"`CompressionReport\('report.pdf'\)`: expected a path that ends in '.html'"):
        CompressionReport("report.pdf")
    module = Measured()
    with pytest.raises(FileNotFoundError):
        trainer(CompressionReport(tmp_path / "report.html", baseline=tmp_path / "no.json")).fit(module, Loader())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UnsupportedError, match=r"expected the package matplotlib.*lightning-light\[report\]"):
        trainer(CompressionReport(tmp_path / "report.html")).fit(module, Loader())
    assert module.losses == []


def test_a_dry_run_leaves_no_file(tmp_path: Path) -> None:
    report = CompressionReport(tmp_path / "report.html")
    trainer(report, fast_dev_run=True).fit(Measured(), Loader())
    assert report.result is not None
    assert json.dumps(report.result.plain())
    assert not list(tmp_path.iterdir())
