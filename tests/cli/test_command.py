"""The command `lightning-light`: each command on real checkpoints and files, each kind of error in one sentence."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_light.budgets import MACs
from lightning_light.cli.command import main
from lightning_light.export import ExportReport
from lightning_light.quantization import Int8, QuantizationAwareTraining, measure_sensitivity
from lightning_light.reparameterization import ACB, Reparameterization
from lightning_light.report import RunReport, report_from_checkpoint
from lightning_light.schedules import OneShot
from lightning_light.structured import StructuredPruning
from lightning_light.surgery.checkpoint import load_from_checkpoint
from tests.cli.nets import Data, Net, batches
from tests.contract.runs import checkpoints, trainer

pytestmark = pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")

ROOT = Path(__file__).parents[2]
NET, EXAMPLE = "--module=tests.cli.nets:Net", "--example=2,3,8,8"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a dense, a pruned and a quantized network, and their exported files."""
    found = tmp_path_factory.mktemp("command")
    callbacks: dict[str, list[Any]] = {
        "dense": [],
        "pruned": [StructuredPruning(MACs(0.5), schedule=OneShot(at=0.2))],
        "quantized": [
            QuantizationAwareTraining(Int8(), start=0.4, calibration_batches=4),
            *checkpoints(found / "steps"),
        ],
    }
    for name, methods in callbacks.items():
        run = trainer(*methods)
        run.fit(Net(), datamodule=Data(samples=12) if name == "dense" else None)
        run.save_checkpoint(found / f"{name}.ckpt")
    assert main(["export", f"{found}/pruned.ckpt", f"--to={found}/pruned.ptl", NET]) == 0  # its example is stored
    assert main(["export", f"{found}/quantized.ckpt", f"--to={found}/int8.onnx", NET, EXAMPLE]) == 0
    (found / "text.ckpt").write_text("no checkpoint")
    (found / "empty.ckpt").write_bytes(b"")
    (found / "cut.ckpt").write_bytes((found / "pruned.ckpt").read_bytes()[:9000])
    torch.save(Net().state_dict(), found / "weights.ckpt")
    damaged = torch.load(found / "pruned.ckpt", weights_only=True)
    damaged["lightning_light"]["edit_log"] = "[]"
    torch.save(damaged, found / "changed.ckpt")
    for name in ("alone", "cut", "swapped", "garbage"):
        (found / f"{name}.ptl").write_bytes((found / "pruned.ptl").read_bytes()[: 3000 if name == "cut" else None])
    report = (found / "pruned.ptl.json").read_text()
    (found / "cut.ptl.json").write_text(report)
    (found / "swapped.ptl.json").write_text((found / "int8.onnx.json").read_text())
    (found / "garbage.ptl.json").write_text("{}")
    return found


def test_inspect_shows_layers_events_and_owners(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{folder}/pruned.ckpt"]) == 0
    pruned, shown = load_from_checkpoint(Net, folder / "pruned.ckpt"), capsys.readouterr().out
    assert re.search(r"pruned.ckpt: epoch 3, step 12, [\d.]+kB, 1 edit of channels\n", shown)
    assert re.search(rf"net.0 +8 → {pruned.net[0].out_channels} ", shown)
    assert re.search(r"\d +0  structured pruning.*: MACs \d+ %, \d+ channels removed from 2 layers", shown)
    assert main(["inspect", f"{folder}/quantized.ckpt"]) == 0
    assert "quantization aware training       3  net.0, net.2, head" in capsys.readouterr().out


def test_diff_shows_sizes_and_the_events_in_between(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, pruned = f"{folder}/dense.ckpt", f"{folder}/pruned.ckpt"
    assert main(["diff", dense, pruned]) == 0
    shown = capsys.readouterr().out
    params = [sum(p.numel() for p in load_from_checkpoint(Net, path).parameters()) for path in (dense, pruned)]
    assert f"{100 * params[1] / params[0]:.1f}%" in shown
    assert "channels removed" in shown
    assert main(["diff", pruned, pruned]) == 0
    assert "no events in between" in capsys.readouterr().out


def test_report_is_that_of_the_checkpoint(folder: Path) -> None:
    assert main(["report", f"{folder}/pruned.ckpt", "-o", f"{folder}/page.html"]) == 0
    assert RunReport.read(folder / "page.json") == report_from_checkpoint(folder / "pruned.ckpt")
    assert "channels removed" in (folder / "page.html").read_text()


def test_benchmark_measures_files_side_by_side(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", f"{folder}/pruned.ptl", f"{folder}/int8.onnx", "--runs=3"]) == 0
    first, second = [line for line in capsys.readouterr().out.splitlines() if str(folder) in line]
    assert "TorchScript lite" in first
    assert first.endswith(" 1x")
    assert "onnxruntime" in second
    assert f"{(folder / 'int8.onnx').stat().st_size / 1000:.3g}kB" in second


def test_verify_runs_the_file_and_compares(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file, checkpoint in (("pruned.ptl", "pruned.ckpt"), ("int8.onnx", "quantized.ckpt")):
        assert main(["verify", f"{folder}/{file}", f"--against={folder}/{checkpoint}", NET, EXAMPLE]) == 0
        assert re.search(rf"{file} agrees with .*{checkpoint} in .*: largest difference", capsys.readouterr().out)
    assert "int8_layers" in ExportReport.read(folder / "int8.onnx.json").details


def test_sensitivity_is_that_of_the_function(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["sensitivity", f"{folder}/dense.ckpt", NET, "--bits", "8", "3", "-o", f"{folder}/scan.json"]
    for given, data in (("Data", Data(samples=12).val_dataloader()), ("batches", batches())):
        options = ["--distance=mse"] if given == "batches" else []
        assert main([*line, f"--data=tests.cli.nets:{given}", *options]) == 0
        module = load_from_checkpoint(Net, folder / "dense.ckpt").eval()
        expected = measure_sensitivity(module, data=data, bits=(8, 3), distance="mse" if options else "kl")
        assert json.loads((folder / "scan.json").read_text()) == expected.rows()
        shown = [row.split() for row in capsys.readouterr().out.splitlines() if re.match("  (net|head)", row)]
        assert [row[0] for row in shown] == expected.most_sensitive(3, bits=3)
        assert shown[0][-2:] == [f"{expected.distances[shown[0][0]][bits]:.3g}" for bits in (3, 8)]


READS = "expected a checkpoint that `torch.load(..., weights_only=True)` reads, found"
ERRORS = {
    "inspect text.ckpt": f"text.ckpt`: {READS}",
    "inspect empty.ckpt": f"empty.ckpt`: {READS} EOFError",
    "inspect cut.ckpt": f"cut.ckpt`: {READS}",
    "inspect weights.ckpt": "weights.ckpt`: expected a checkpoint of Lightning, found no 'state_dict' in it, but",
    "inspect changed.ckpt": "changed.ckpt`: The checkpoint's manifest is damaged: expected it to match its digest",
    "inspect missing.ckpt": "No such file or directory: ",
    "benchmark missing.ptl": "missing.ptl`: expected a file or a folder, found nothing there",
    "benchmark model.tflite": "expected a path that ends in one of '.ptl' (TorchScriptLite), '.pte' (ExecuTorch)",
    "benchmark alone.ptl": "alone.ptl`: expected its report beside it, ",
    "benchmark cut.ptl": "expected the file that its report describes, of ",
    "benchmark swapped.ptl": "It is of another export, or damaged: export again.",
    "benchmark garbage.ptl": "garbage.ptl.json`: expected the report of an exported file, found KeyError",
    f"export dense.ckpt --to=a.ptl {NET}": "Give the shape of a batch: `--example 1,3,32,32`.",
    f"export dense.ckpt --to=a.ptl {NET} --example=1,x": "expected a shape and maybe a type, as 1,3,32,32 or",
    f"export dense.ckpt --to=a.ptl {NET} --example=1,2,8,8": "found RuntimeError: Given groups=1, weight of size",
    f"export dense.ckpt --to=a.tflite {NET}": "found '.tflite'",
    f"export quantized.ckpt --to=a.pt2 {NET} {EXAMPLE}": "expected a float network, found a fake-quantized `Net`",
    f"export steps/step=6.ckpt --to=a.ptl {NET} {EXAMPLE}": "found one whose ranges were still being observed",
    "export dense.ckpt --to=a.ptl --module=nowhere:Net": "expected a class to import, found that No module named",
    "export dense.ckpt --to=a.ptl --module=torch.nn:Linear": "expected the class of a LightningModule, found <class",
    "export dense.ckpt --to=a.ptl --module=Net": "`--module Net`: expected a path as package.module:Name.",
    "export dense.ckpt --to=a.ptl --module=tests.cli.nets:Demanding": "missing 1 required positional argument",
    "export pruned.ckpt --to=a.ptl --module=tests.cli.nets:Wide": "The checkpoint is of another network than this",
    f"export dense.ckpt --to=a.ptl {NET} {EXAMPLE} --inputs y": "`--inputs y`: expected inputs of `Net.forward`",
    f"export cut.ckpt --to=a.ptl {NET}": f"cut.ckpt`: {READS}",
    f"verify pruned.ptl --against=cut.ckpt {NET}": f"cut.ckpt`: {READS}",
    f"verify cut.ptl --against=pruned.ckpt {NET}": "expected the file that its report describes, of ",
    f"verify pruned.ptl --against=dense.ckpt {NET} {EXAMPLE} --absolute=0": "dense.ckpt`: `--absolute 0.0 --relative ",
    f"verify pruned.ptl --against=dense.ckpt {NET} {EXAMPLE}": "`--absolute ...`. Or the file is of another",
    "diff dense.ckpt cut.ckpt": f"cut.ckpt`: {READS}",
    "report cut.ckpt": f"cut.ckpt`: {READS}",
    f"verify int8.onnx --against=dense.ckpt {NET} {EXAMPLE}": "expected the quantized network that the file is of",
    f"convert dense.ckpt --to=a.ckpt {NET} {EXAMPLE}": "expected one of --macs, --params, --energy, --ratio, --evb",
    f"convert dense.ckpt --to=a.ckpt {NET} {EXAMPLE} --macs=3": "`--macs 3.0`: expected 0 < remaining <= 1, found 3.0",
    f"convert dense.ckpt --to=a.ckpt {NET} {EXAMPLE} --energy=0": "`--energy 0.0`: expected 0 < ",
    f"convert dense.ckpt --to=a.ckpt {NET} --merge": "expected convolutions that `Reparameterization` has expanded, ",
    f"convert dense.ckpt --to=a.ckpt {NET} --merge --form=tucker2": "`convert --merge`: expected no --form, an option",
    f"convert cut.ckpt --to=a.ckpt {NET} --macs=0.5": f"cut.ckpt`: {READS}",
    f"sensitivity cut.ckpt {NET}": f"cut.ckpt`: {READS}",
    f"sensitivity dense.ckpt {NET}": "Give a data module, or a function that returns batches: `--data package",
    f"sensitivity dense.ckpt {NET} --data=tests.cli.nets:Dat": "nets:Dat`: expected a class to import",
    f"sensitivity dense.ckpt {NET} --data=tests.cli.nets:no_batches": "expected validation batches, found none.",
    f"sensitivity dense.ckpt {NET} --data=tests.cli.nets:Net": "`tests.cli.nets:Net`: expected validation batches, fou",
    f"sensitivity dense.ckpt {NET} --data=tests.cli.nets:batches --bits 9": "`--bits 9`: expected ",
}


def test_branches_of_a_checkpoint_are_merged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run, net = trainer(Reparameterization(ACB())), Net()
    run.fit(net)
    run.save_checkpoint(tmp_path / "expanded.ckpt")
    assert main(["convert", f"{tmp_path}/expanded.ckpt", f"--to={tmp_path}/merged.ckpt", NET, "--merge"]) == 0
    assert "merged" in capfd.readouterr().out
    merged, x = load_from_checkpoint(Net, tmp_path / "merged.ckpt").eval(), torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(merged(x), net.eval()(x), rtol=1e-5, atol=1e-5)
    assert sorted(p.shape for p in merged.parameters()) == sorted(p.shape for p in Net().parameters())


@pytest.mark.parametrize("line", ERRORS)
def test_an_error_is_one_sentence(
    line: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(ROOT))
    assert main(line.split()) == 1
    out, error = capfd.readouterr()
    assert out == ""
    assert error.startswith("lightning-light: ")
    assert error.count("\n") == 1
    assert ERRORS[line] in error
    assert not list(folder.glob("a.*"))


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    module = "--module=tests.cli.nets:Branching"
    assert main(["export", f"{folder}/dense.ckpt", f"--to={tmp_path}/a.ptl", module, EXAMPLE]) == 0
    error = capfd.readouterr().err
    assert re.match(r"lightning-light: warning: `TorchScriptLite\(.*\)` on `Branching`: Python values that were", error)
    assert error.count("\n") == 1


WRONG = {
    "": 'expected "command" to be one of {inspect,benchmark,verify,export,diff, ...}, but it was not provided. See `',
    "benchmark a.ptl --threads=0": "`threads`: expected a positive int, found 0.\n",
    "benchmark a.ptl --threads=two": "`threads`: expected a positive int, found 'two'.\n",
    "export a.ckpt --to=a.ptl": "`export.module`: expected values, found none.\n",
    "inspect a.ckpt b.ckpt": "unrecognized arguments: b.ckpt. See `lightning-light inspect --help`.\n",
    f"sensitivity a.ckpt {NET} --bits 8 x": "`bits`: expected int, found x.\n",
    f"verify a.ptl --against a.ckpt {NET} --absolute=-1": "`absolute`: expected a non negative float, found -1.\n",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_arguments_are_one_sentence_and_status_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(line.split())
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {WRONG[line]}")
    assert error.count("\n") == 1


MISSING = {
    "inspect pruned.ckpt": ("jsonargparse", "cli"),
    f"export dense.ckpt --to=a.onnx {NET} {EXAMPLE}": ("onnxruntime", "onnx"),
    f"verify int8.onnx --against=quantized.ckpt {NET} {EXAMPLE}": ("onnxruntime", "onnx"),
    "benchmark int8.onnx": ("onnxruntime", "onnx"),
    "report pruned.ckpt -o a.html": ("matplotlib.figure", "report"),
}


@pytest.mark.parametrize("line", MISSING)
def test_a_missing_extra_is_named(
    line: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    package, extra = MISSING[line]
    monkeypatch.setitem(sys.modules, package, None)
    assert main(line.split()) == 1
    error = capfd.readouterr().err
    assert error.endswith(f": `pip install lightning-light[{extra}]`.\n")
    assert error.count("\n") == 1
    assert not list(folder.glob("a.*"))


@pytest.mark.slow
def test_the_module_is_the_command(folder: Path) -> None:
    assert 'lightning-light = "lightning_light.cli.command:main"' in (ROOT / "pyproject.toml").read_text()
    command = [sys.executable, "-m", "lightning_light", "inspect", f"{folder}/text.ckpt"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("lightning-light: ")
    assert done.stderr.count("\n") == 1


def test_help_needs_no_torch() -> None:
    code = (
        "import contextlib, sys; from lightning_light.cli.command import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "{inspect,benchmark,verify,export,diff,report,sensitivity,convert}" in done.stdout
