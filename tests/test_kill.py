"""Runs that are killed at any step and started again end as if they had not been; and what a full disk leaves."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]


def script(name: str, *arguments: Any, timeout: int = 500) -> str:
    """What a script of this folder prints."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.{name}", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("world", "count", "seed"), [(1, 2, 1), (2, 1, 2)])  # seed 2 kills where ranks communicate
def test_killed_and_started_again(world, count, seed, tmp_path) -> None:
    found = json.loads(script("kill_script", tmp_path, count, seed, world).splitlines()[-1])
    assert found["wrong"] == []
    assert found["kills"] >= count
    if world > 1:
        assert any("closed by peer" in message or "reset by peer" in message for message in found["messages"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_searches_killed_in_each_phase_and_started_again(tmp_path) -> None:
    found = json.loads(script("nas.kill_script", tmp_path).splitlines()[-1])
    assert found.keys() == {"fit-table", "fit-networks", "fit-change", "search-table", "search-networks"}
    for what, outcome in found.items():
        assert outcome["status"] == -signal.SIGKILL, what
        assert outcome["differs"] == [], what


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_full_disk_and_a_read_only_folder_leave_the_files_that_were_there(tmp_path) -> None:
    found = json.loads(script("full_disk_script", tmp_path).splitlines()[-1])
    assert set(found) == {"checkpoint", "export", "clustering", "expand"}
    for what, outcome in found.items():
        assert outcome["error"] in ("OSError", "RuntimeError", "SafetensorError", "LightningLightError"), what
        assert outcome["same"], what
        assert outcome["left"] == [], what
    torch.load(tmp_path / "last.ckpt", weights_only=True)
