"""Two ranks with data of their own end with the same masks and weights, and resume bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["taylor", "wanda", "sr_ste", "rigl", "set"])
def test_two_ranks_end_identical_and_resume(case, tmp_path) -> None:
    command = [sys.executable, "-m", "tests.sparsity.ddp_script", case, str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "MASTER_PORT")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    for rank in (0, 1):
        file = tmp_path / f"rank{rank}.json"
        assert file.exists(), done.stderr[-3000:]
        assert json.loads(file.read_text()) == {"apart": [0.0, 0.0], "leak": 0.0, "resumed": True, "sparse": True}
