"""Run the example as a user does, on a few of its images."""

import re
from pathlib import Path

import numpy as np
import pytest

from tests.test_examples import EXAMPLES, run


@pytest.mark.slow
def test_example_factorizes_clusters_and_compares(tmp_path) -> None:
    with np.load(EXAMPLES / "data" / "fashion_mnist_10k.npz") as archive:
        small = {name: archive[name][:300] for name in archive.files}
    np.savez(tmp_path / "small.npz", **small)
    printed = run(EXAMPLES / "05_low_rank.py", f"--data={tmp_path / 'small.npz'}", "--epochs=3", folder=tmp_path)
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in printed.splitlines() if line.startswith("│")}
    macs = {name: float(re.findall(r"[\d.]+", cells[2])[0]) for name, cells in rows.items()}
    assert macs["factorized"] <= 0.51 * macs["dense"]
    files = {
        name: (Path(tmp_path) / "runs" / "low_rank" / f"{name}.safetensors").stat().st_size
        for name in ("factorized", "clustered")
    }
    assert files["clustered"] < 0.5 * files["factorized"]
