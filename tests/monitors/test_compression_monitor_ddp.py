import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.surgery.runs import same

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_processes_write_one_log_and_one_table_and_train_the_same(tmp_path: Path) -> None:
    printed = {}
    for kind in ("alone", "watched"):
        done = subprocess.run(
            [sys.executable, "-m", "tests.monitors.two_processes", str(tmp_path), kind],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        printed[kind] = done.stdout
    assert printed["watched"].count("Compression: before → after") == 1
    assert "before → after" not in printed["alone"]
    assert len(list(tmp_path.rglob("*tfevents*"))) == 1
    runs = {f"{kind}-{rank}": torch.load(tmp_path / f"{kind}-{rank}.pt") for kind in printed for rank in (0, 1)}
    assert all(same(weights, runs["alone-0"]) for weights in runs.values())
