"""The examples of distillation run as a user runs them, on a small part of their data, and end with a table."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS = {
    "03_distill": ["teacher", "student alone", "student with teacher"],
    "04_distill_while_pruning": ["dense", "pruned alone", "pruned with itself as teacher"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ROWS))
def test_an_example_prints_its_table(name: str, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("fashion_mnist", EXAMPLES / "fashion_mnist.py")
    assert spec is not None
    assert spec.loader is not None
    fashion_mnist = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fashion_mnist)
    arrays = fashion_mnist.load(fashion_mnist.EMBEDDED)
    np.savez(tmp_path / "small.npz", **{part: array[:500] for part, array in arrays.items()})
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), "--data=small.npz", "--epochs=2"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    start = next(place for place, line in enumerate(lines) if "Before -> after" in line)
    assert [line.split("│")[1].strip() for line in lines[start:] if line.startswith("│")] == ROWS[name]
