"""`LightningLightCLI`: a wrong key, class or value gives one sentence; `plan` prints the plan of a run."""

import json
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
PROGRAM = """
import contextlib, io, json, sys
from {0}.demos.boring_classes import BoringModel
from lightning_light.cli import LightningLightCLI

class Net(BoringModel):
    def __init__(self, net: int = 3):
        super().__init__()

def run(arguments):
    with contextlib.redirect_stderr(io.StringIO()) as error, contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            LightningLightCLI(Net, args=["fit", *arguments], seed_everything_default=0, save_config_callback=None)
        except SystemExit as stopped:
            return stopped.code, out.getvalue(), error.getvalue()

print(json.dumps({{name: run(arguments) for name, arguments in json.load(sys.stdin).items()}}))
"""


def start(arguments: list[str], monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["main.py"])
    LightningLightCLI(Boring, args=arguments, seed_everything_default=0, save_config_callback=None, **options)


def check(name: str, status: object, error: str) -> None:
    """The status is that of wrong arguments, and the sentence is the whole output."""
    assert status == 2
    (line,) = [line for line in error.splitlines() if not line.startswith("Seed set")]
    assert re.search(f"^error: .*{WRONG[name][1]}", line)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_input_gives_one_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(WRONG[name][0])
    with pytest.raises(SystemExit) as stopped:
        start(["fit", f"--config={tmp_path / 'run.yaml'}"], monkeypatch)
    check(name, stopped.value.code, capsys.readouterr().err)


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
    (tmp_path / "main.py").write_text(PROGRAM.format(host))
    for name, (text, _) in WRONG.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    length = ["--trainer.max_epochs=2", "--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    budget = ["--trainer.callbacks.budget=MACs", "--trainer.callbacks.budget.remaining=0.00001"]
    given = {name: [f"--config={name}.yaml"] for name in WRONG}
    given["help"] = ["--trainer.callbacks.help=StructuredPruning"]
    given["print"] = ["--trainer.max_epochs=7", "--print_config"]
    given["refused"] = ["--trainer.callbacks+=StructuredPruning", *budget, *length, "--trainer.accelerator=cpu"]
    command = [sys.executable, "-W", "ignore", "main.py"]
    done = subprocess.run(command, cwd=tmp_path, input=json.dumps(given), capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    for name in WRONG:
        check(name, found[name][0], found[name][2])
    assert "StructuredPruning" in found["help"][1]
    assert "max_epochs: 7" in found["print"][1]
    assert re.match(r"error: `MACs\(remaining=1e-05\)` cannot be reached: ", found["refused"][0])
