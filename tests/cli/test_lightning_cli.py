"""`LightningLightCLI`: a wrong key, class or value gives one sentence; `plan` prints the plan of a run."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_light.cli import LightningLightCLI
from tests.zoo import Boring

pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

CALLBACK = "trainer: {{callbacks: [{{class_path: {}, init_args: {{{}}}}}]}}"
BUDGET = "budget: {class_path: MACs, init_args: {remaining: 0.4}}"
PRUNING = "StructuredPruning"
WRONG = {
    "key of the trainer": ("trainer: {max_epoch: 3}", "`trainer.max_epoch`: expected an argument, .* `trainer.max_epo"),
    "key at the top": ("trane: 3", "`trane`: expected an argument, found none of this name. The nearest: `trainer`."),
    "key of the model": ("model: {nett: 3}", "`model.nett`: .* The nearest: `model.net`"),
    "key of a callback": (
        CALLBACK.format(PRUNING, BUDGET.replace("budget", "budgett")),
        "`budgett`: expected an argument of `StructuredPruning`, found none of this name. The nearest: `budget`.",
    ),
    "key of a budget": (
        CALLBACK.format(PRUNING, BUDGET.replace("remaining", "remainin")),
        "`remainin`: expected an argument of `MACs`, .* `remaining`.",
    ),
    "class of a callback": ("trainer: {callbacks: [StructuredPrunning]}", "`StructuredPrunning`: .* `StructuredPrun"),
    "path of a class": ("trainer: {callbacks: [lightning_light.WeightPrun]}", "`WeightPrun`: expected a class, .* `W"),
    "class of Lightning": ("trainer: {callbacks: [ModelCheckpiont]}", "The nearest: `ModelCheckpoint`"),
    "class of a budget": (CALLBACK.format(PRUNING, BUDGET.replace("MACs", "MAC")), "`MAC`: .* nearest: `MACs`"),
    "class of a criterion": (CALLBACK.format(PRUNING, BUDGET + ", criterion: Magnitud"), "nearest: `Magnitude`"),
    "choice": (
        CALLBACK.format(PRUNING, BUDGET + ", heads: dims"),
        r"`heads`: expected Literal\['dim', 'head'\], found dims.",
    ),
    "range of a budget": (
        CALLBACK.format(PRUNING, BUDGET.replace("0.4", "1.4")),
        r"`MACs\(remaining=1.4\)`: expected 0 < remaining <= 1, found 1.4.",
    ),
    "range of a callback": (
        CALLBACK.format("WeightClustering", "clusters: 1"),
        r"`WeightClustering\(clusters=1\)`: expected 2 <= clusters <= 256, found 1.",
    ),
    "type": ("trainer: {max_epochs: many}", "`trainer.max_epochs`: expected int or null, found many."),
    "suffix": (CALLBACK.format("MobileExport", "path: model.tfl"), r"'model.tfl'`: expected a path that ends in one"),
}


def start(arguments: list[str], monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["main.py"])
    LightningLightCLI(Boring, args=arguments, seed_everything_default=0, save_config_callback=None, **options)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_input_gives_one_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, sentence = WRONG[name]
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        start(["fit", f"--config={tmp_path / 'run.yaml'}"], monkeypatch)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Seed set")]
    assert len(lines) == 1
    assert re.search(f"^error: .*{sentence}", lines[0])


def test_plan_prints_what_fit_would_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(
        CALLBACK.format(PRUNING, BUDGET).replace("trainer: {", "trainer: {max_epochs: 9, ")
    )
    monkeypatch.setattr(Boring, "train_dataloader", lambda self: Boring.data(), raising=False)
    start(["plan", f"--config={tmp_path / 'run.yaml'}", "--trainer.logger=false"], monkeypatch)
    printed = capsys.readouterr().out
    assert "Plan of the run" in printed
    assert "epochs 0.9 to 3.6, steps 4 to 14" in printed


@pytest.mark.slow
@pytest.mark.parametrize("host", ["lightning.pytorch", "pytorch_lightning"])
def test_both_hosts_in_a_process_of_their_own(host: str, tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(
        f"from {host}.demos.boring_classes import BoringModel\n"
        "from lightning_light.cli import LightningLightCLI\n"
        "LightningLightCLI(BoringModel)\n"
    )

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "main.py", "fit", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    wrong = run("--trainer.callbacks+=WeightClusterin")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "The nearest: `WeightClustering`" in wrong.stderr
    assert "StructuredPruning" in run("--trainer.callbacks.help=StructuredPruning").stdout
    assert "max_epochs: 7" in run("--trainer.max_epochs=7", "--print_config").stdout
    budget = ["--trainer.callbacks.budget=MACs", "--trainer.callbacks.budget.remaining=0.00001"]
    length = ["--trainer.max_epochs=2", "--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    refused = run("--trainer.callbacks+=StructuredPruning", *budget, *length, "--trainer.accelerator=cpu")
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
