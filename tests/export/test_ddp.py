"""Two real processes over gloo: the first exports, the other one waits and shares its fate."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def two_processes(folder: Path, way: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(Path(__file__).with_name("ddp_run.py")), str(folder), way]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
def test_first_process_exports(tmp_path: Path) -> None:
    first, second = two_processes(tmp_path, "works")
    assert first == {"failure": None, "report": True, "batches": 2, "metrics": ["accuracy"], "hooks": 0}
    assert second == {"failure": None, "report": False, "batches": None, "metrics": None, "hooks": 0}
    assert (tmp_path / "model.ptl").exists()


@pytest.mark.slow
def test_both_processes_fail_and_the_network_is_saved(tmp_path: Path) -> None:
    first, second = two_processes(tmp_path, "fails")
    assert first["failure"].startswith("ParityError: `parity=Tolerance(absolute=0.0")
    assert second["failure"].startswith("LightningLightError: `MobileExport(")
    assert "ParityError" in second["failure"]
    assert (tmp_path / "model.ptl.ckpt").exists()
    assert not (tmp_path / "model.ptl").exists()
