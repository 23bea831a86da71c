"""Every result that a public function returns is a table, printed and in a notebook."""

import html
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from torch import nn

import lightning_light as ll
from lightning_light import measure
from lightning_light.measure.snapshot import Snapshot
from lightning_light.report import RunReport
from lightning_light.tuning import TuningResult
from tests.zoo import ZOO

IMAGES = torch.randn(4, 3, 8, 8)
NOT_RESULTS = {"CompressionState", "Edit", "Gathered", "Schedule", "Targets", "TeacherSource"}
"""Of these packages, what public functions return for other functions."""


def returned() -> set[type]:
    """Find the classes of this package that public functions return."""
    functions = [getattr(ll, name) for name in ll.__all__]
    functions += [getattr(module, name) for module in map(ll.__getattr__, ll._MODULES) for name in module.__all__]
    hints = [get_type_hints(each).get("return") for each in functions if inspect.isfunction(each)]
    classes = {hint for hint in hints if inspect.isclass(hint) and hint.__module__.startswith("lightning_light.")}
    return {each for each in classes if each.__name__ not in NOT_RESULTS}


class Residual(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


class Net(nn.Module):
    """A residual block between a convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = Residual(nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.stem(x)).mean((2, 3)))


def report(**parts: Any) -> RunReport:
    return RunReport(measure.take_snapshot(nn.Linear(8, 4)), measure.take_snapshot(nn.Linear(8, 2)), **parts)


def tuned() -> TuningResult:
    optuna = pytest.importorskip("optuna")
    study = optuna.create_study(direction="maximize")
    study.add_trial(optuna.trial.create_trial(params={}, distributions={}, value=0.875))
    return TuningResult(study, {"accuracy": "max"}, {})


def expanded() -> Net:
    net = Net()
    ll.reparameterization.expand_branches(net, IMAGES, ll.reparameterization.RepVGG())
    return net


def exported(folder: Path) -> Any:
    return ll.export_model(Net(), IMAGES, folder / "net.ptl", latency_runs=1)


RESULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "Cost": (lambda _: measure.count_cost(Net(), (IMAGES[:1],)), "block.1 36.9k 584"),
    "DataTable": (lambda _: measure.compression_table(report().before, report().after), "(model) 4 → 2 36 → 18"),
    "DepthPlan": (lambda _: ll.prune_blocks(Net(), IMAGES, ll.MACs(0.5), data=[IMAGES]), "block removed (score"),
    "Expansion": (
        lambda _: ll.reparameterization.expand_branches(Net(), IMAGES, ll.reparameterization.RepVGG()),
        "block.1 conv, identity",
    ),
    "ExportReport": (exported, "runtime TorchScript lite interpreter"),
    "FactorizationPlan": (lambda _: ll.factorize(ZOO["plain"](), IMAGES, ll.MACs(0.8)), "factorized "),
    "LatencyStats": (lambda _: measure.LatencyStats(0.002, 0.001, 0.003, 50, 1), "2 ms 1 ms 3 ms 50 1"),
    "Merging": (lambda _: ll.merge_branches(expanded(), IMAGES), "block.1 merged"),
    "Plan": (lambda _: ll.prune_channels(Net(), IMAGES, ll.MACs(0.5)), "head kept (produces the model output)"),
    "RunPlan": (lambda _: ll.plan(Net(), IMAGES, [ll.StructuredPruning(ll.MACs(0.5))]), "StructuredPruning 10% to 40%"),
    "RunReport": (lambda _: report(), "parameters 36 18 50.0%"),
    "SearchResult": (
        lambda _: ll.search(
            Net(),
            IMAGES,
            ll.MACs(0.7),
            data=[IMAGES, IMAGES],
            evaluations=0,
            calibration_batches=1,
            evaluation_batches=1,
        ),
        "of the predictions change before training",
    ),
    "Sensitivity": (lambda _: ll.measure_sensitivity(Net(), data=[IMAGES], bits=(4,)), "stem 216 "),
    "Snapshot": (lambda _: measure.take_snapshot(Net()), "block.1 8 584 2.34kB 0% 32"),
    "SparsityReport": (lambda _: ll.measure_sparsity(Net()), "block.1 0% 0 584"),
    "SubstitutionPlan": (
        lambda _: ll.substitute_operators(Net(), IMAGES, ll.MACs(0.6), data=[IMAGES], fit_steps=1),
        "replaced 1 convolution",
    ),
    "TuningResult": (lambda _: tuned(), "0 * 0.875"),
}


def text_of(shown: str) -> str:
    """Return the text of an HTML page, on one line."""
    return " ".join(html.unescape(re.sub(r"<svg.*</svg>|<[^>]+>", " ", shown, flags=re.DOTALL)).split())


@pytest.mark.parametrize("kind", sorted(returned(), key=lambda kind: kind.__name__), ids=lambda kind: kind.__name__)
def test_results_of_public_functions_are_tables(kind: type, tmp_path: Path) -> None:
    make, expected = RESULTS[kind.__name__]
    result = make(tmp_path)
    assert type(result) is kind
    assert expected in text_of(result._repr_html_())
    assert expected in " ".join(str(result).split())


def test_a_report_in_a_notebook_has_the_picture_of_the_run() -> None:
    pytest.importorskip("matplotlib")
    start = Snapshot.from_plain(report().before.plain())
    history = measure.History.of(start, ["conv", ""]).extended(0, start, start).extended(5, start, report().after)
    dense = report(metrics={"accuracy": [(3, 0.4)]}).plain()
    result = report(history=history, metrics={"accuracy": [(5, 0.5)], "loss": [(5, 2.0)]}, baseline=dense)
    assert result.picture() in result._repr_html_()
    assert "remaining output channels of each layer" in result.picture()
    assert ">accuracy<" in result.picture()
    assert ">accuracy (baseline)<" in result.picture()
    assert ">loss<" not in result.picture()  # beside fractions, it has no scale
