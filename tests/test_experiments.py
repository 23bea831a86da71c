"""The comparison of methods: which jobs run, what a result holds, and the page made from results."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_light as ll
from benchmarks.experiments import page
from benchmarks.experiments.harness import RESULTS, Job, run_missing
from benchmarks.experiments.methods import Method, PruneChannels
from benchmarks.experiments.plots import plot
from benchmarks.experiments.rows import read
from benchmarks.experiments.table import EXPERIMENTS, NONE, OURS, Experiment
from benchmarks.experiments.tasks import Classifier, Task


class Tiny(Task):
    """Two convolutions on random images."""

    name, shape = "tiny", (1, 6, 6)

    def missing(self) -> str | None:
        return None

    def untrained(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 2 * 2, 3)
        )

    def trained(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return self.untrained().eval()

    def module(self, net: nn.Module) -> Classifier:
        return Classifier(net, 0.1, self.example)

    def train_loader(self) -> DataLoader[Any]:
        images = torch.randn(16, *self.shape, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(images, torch.arange(16) % 3), 8)

    test_loader = train_loader


@dataclass(frozen=True)
class Killed(Method):
    """Interrupted in the middle."""

    def finish(self, run: Any) -> None:
        raise KeyboardInterrupt


def jobs(folder: Path, *methods: Method) -> list[Job]:
    """Two seeds of each."""
    found = [Experiment(f"row-{index}", "section", "title", method) for index, method in enumerate(methods)]
    return [Job(experiment, Tiny(), 1, seed, folder) for experiment in found for seed in (0, 1)]


@pytest.mark.filterwarnings("ignore::Warning")
def test_an_interrupted_run_continues_with_the_job_that_has_no_result(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    done, killed = jobs(tmp_path / "results", PruneChannels(ll.MACs(0.5)), Killed())[::2]
    reports: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run_missing([done, killed], tmp_path, reports.append)
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["row-0-0.json"]
    result = json.loads(done.path.read_text())
    assert result["macs"] <= result["dense"]["macs"] / 2
    assert result["file"]["accuracy"] == result["accuracy"]
    assert result["file"]["bytes"] < result["dense"]["bytes"]
    run_missing(jobs(tmp_path / "results", PruneChannels(ll.MACs(0.5)), Method())[::2], tmp_path, reports.append)
    assert [report.partition(":")[0] for report in reports] == ["row-0-0", "row-1-0"]  # the first did not run twice
    assert json.loads((tmp_path / "results" / "row-1-0.json").read_text())["macs"] == result["dense"]["macs"]


@pytest.mark.filterwarnings("ignore::Warning")
def test_a_result_of_other_settings_is_missing(tmp_path: Path) -> None:
    (job, _) = jobs(tmp_path, Method())
    job.path.write_text(json.dumps({"settings": job.settings}))
    assert job.done()
    assert not Job(job.experiment, job.task, 2, job.seed, job.folder).done()


def test_the_page_in_the_repository_is_the_one_of_the_results(tmp_path: Path) -> None:
    rows = read(RESULTS / "cpu")
    assert page.PAGE.read_text() == page.text(rows)
    pytest.importorskip("matplotlib")
    for name in ("first.svg", "second.svg"):
        plot(rows[:3], "macs", tmp_path / name)
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()


def test_the_page_compares_seed_by_seed(tmp_path: Path) -> None:
    (source,) = RESULTS.glob("cpu/dense-0.json")
    result = json.loads(source.read_text())
    for name, accuracies in {"sparse-one-shot-0.9": (0.90, 0.80), "torch-prune-0.9": (0.89, 0.78)}.items():
        for seed, accuracy in enumerate(accuracies):
            changed = copy.deepcopy(result) | {"accuracy": accuracy}
            changed["settings"]["seed"] = seed
            (tmp_path / f"{name}-{seed}.json").write_text(json.dumps(changed))
    text = page.text(read(tmp_path))
    assert "| +1.50 ± 0.71 | 2 | 2 higher |" in text
    assert "| 85.00 ± 7.07 % | 2 |" in text


def test_names_are_unique_and_peers_are_compared_with_rows_of_this_package() -> None:
    by_name = {experiment.name: experiment for experiment in EXPERIMENTS}
    assert len(by_name) == len(EXPERIMENTS) >= 24
    for experiment in EXPERIMENTS:
        assert (experiment.package in (OURS, NONE)) == (not experiment.beside)
        assert {by_name[name].package for name in experiment.beside} <= {OURS}
