"""Killed at any step, without a chance to tidy up, and started again: the end is the same to the last bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contract.runs import differences

ROOT = Path(__file__).parents[1]


def run(folder: Path, kill_at: int = 0) -> int:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill_script", str(folder), str(kill_at)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
    return done.returncode


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder) == 0
    return end_of(folder)


def end_of(folder: Path) -> dict[str, Any]:
    end: dict[str, Any] = torch.load(folder / "end.pt", weights_only=True)
    return end


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("steps", [(1,), (4,), (6,), (8,), (11,), (2, 5, 9)], ids=str)
def test_killed_and_started_again(whole, steps, tmp_path) -> None:
    for step in steps:
        assert run(tmp_path, step) == -signal.SIGKILL
        assert not (tmp_path / "end.pt").exists()
    assert run(tmp_path) == 0
    end = end_of(tmp_path)
    losses, later = whole["losses"], end.pop("losses")
    assert losses[-len(later) :] == later
    assert not differences({key: value for key, value in whole.items() if key != "losses"}, end)
