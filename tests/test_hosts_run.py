"""A project that has either host, and only that, trains, resumes and exports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("host", ["lightning.pytorch", "pytorch_lightning"])
def test_one_host_alone(host, tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "hosts_script.py"), host, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
