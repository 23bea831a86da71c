"""The quickstart is followed literally, in a fresh folder: files, commands, and what it states about them."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_light.report import RunReport

ROOT = Path(__file__).parents[1]
ELSEWHERE = ("pip install", "tensorboard")  # commands that install, or wait for a browser

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # under a minute of one core


def run(command: str, folder: Path) -> str:
    """What a shell command prints."""
    done = subprocess.run(["bash", "-euc", command], cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment() -> dict[str, str]:
    """That of a shell in which this Python and its commands come first, on one thread: other parts run beside it."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "80", "OMP_NUM_THREADS": "1"}


def interrupt(command: str, folder: Path, when: Path) -> None:
    """Start a command, and press Ctrl+C once a file is there."""
    options: dict[str, Any] = {"cwd": folder, "env": environment(), "stdout": -1, "stderr": subprocess.STDOUT}
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores it
    with subprocess.Popen(command.split(), **options) as process:
        while not when.exists() and process.poll() is None:
            time.sleep(0.1)
        assert process.poll() is None, process.communicate()[0].decode()
        process.send_signal(signal.SIGINT)
        process.communicate()


def test_the_quickstart_is_right_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    printed = {}
    document = (ROOT / "docs" / "quickstart.md").read_text()
    for language, block in re.findall(r"^```(python|sh)\n(.*?)^```", document, flags=re.DOTALL | re.MULTILINE):
        file = re.match(r"# (\w+\.py)\n", block)
        if file is not None:
            (tmp_path / file[1]).write_text(block)
        elif language == "python":
            exec(block, {})
        elif not block.startswith(ELSEWHERE):
            if block == "python train.py\n":
                interrupt(block, tmp_path, tmp_path / "checkpoints" / "last.ckpt")
                assert not (tmp_path / "model.onnx").exists()
            printed[block.split("\n")[0]] = run(block, tmp_path)

    assert "StructuredPruning  10% to 40%" in printed["python compression.py"]
    assert "structured pruning" in (inspected := printed["lightning-light inspect checkpoints/last.ckpt"])
    assert "model.ptl" in inspected
    files = ("model.onnx", "model.onnx.json", "model.ptl", "report.html", "report.json", "again.html", "net.ptl")
    assert [name for name in files if not (tmp_path / name).exists()] == []
    report = RunReport.read("report.json")
    assert report.after.macs is not None
    assert report.before.macs is not None
    assert 0.3 * report.before.macs < report.after.macs <= 0.4 * report.before.macs
    assert len(report.metrics["val_accuracy"]) == 3  # of the run before the interruption too
    assert report.metrics["val_accuracy"][-1][1] > 0.8

    events = EventAccumulator(str(tmp_path / "lightning_logs" / "version_1"), size_guidance={"tensors": 0}).Reload()
    macs = {event.step: event.value for event in events.Scalars("compression/macs")}
    assert macs[max(macs)] == report.after.macs
    tags = events.Tags()
    for key in ("macs", "params", "size", "macs_planned"):
        assert f"compression/{key}" in tags["scalars"]
    assert "compression_layers/channels/net.0" in tags["scalars"]
    assert any(tag.startswith("compression_layers/heat_map") for tag in tags["images"])
    assert {"compression/events/text_summary", "compression/table/text_summary"} <= set(tags["tensors"])
