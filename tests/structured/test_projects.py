"""Networks whose training reads more than ``forward``: pruned to a budget, trained on, resumed, and loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_light as ll
from lightning_light.budgets import Params
from lightning_light.schedules import OneShot
from lightning_light.structured import StructuredPruning
from tests.contract.runs import checkpoints, differences, outcome, shapes, trainer
from tests.language_projects import LANGUAGE_PROJECTS
from tests.projects import PROJECTS, Board

GOALS = {"graph network": 0.7, "forecaster": 0.8, "autoencoder": 0.35, "gan": 0.3, "variational autoencoder": 0.2}
STAY: dict[str, dict[str, tuple[int, ...]]] = {
    "autoencoder": {"decoder.2.bias": (3,), "encoder.1.bias": (6,)},
    "mean teacher": {"perceptual.0.bias": (6,)},
    "auxiliary heads": {"neck.bias": (10,)},
    "gan": {"generator.2.bias": (192,)},
    "forecaster": {"model.mean.bias": (4,)},
}
"""Tensors that keep their shape, because of what training does with them."""


def parameters(module: Any) -> int:
    """Count those of the network; frozen networks that ``forward`` does not call are none of it."""
    network = getattr(module, "student", module)
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    "name", [*PROJECTS, *(pytest.param(name, marks=pytest.mark.slow) for name in LANGUAGE_PROJECTS)]
)
def test_a_project_is_pruned_trained_on_resumed_and_loaded(name, tmp_path) -> None:
    kind, goal = (PROJECTS | LANGUAGE_PROJECTS)[name], GOALS.get(name, 0.6)

    def pruning() -> StructuredPruning:
        return StructuredPruning(Params(goal), schedule=OneShot(at=0.5))

    module, resumed, board = kind(), kind(), Board()
    whole = trainer(pruning(), checkpoints(tmp_path)[1], max_epochs=2, logger=board)
    whole.fit(module)
    assert board.images == (8 if name == "segmentation" else 0)
    assert not hasattr(module, "follow") or module.follow.updates == 8
    assert parameters(module) <= goal * parameters(kind())
    assert all(torch.isfinite(tensor).all() for tensor in module.state_dict().values())
    assert {key: shapes(module)[key] for key in STAY.get(name, {})} == STAY.get(name, {})
    again = trainer(pruning(), max_epochs=2, logger=Board())
    again.fit(resumed, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert not differences(outcome(whole, module), outcome(again, resumed))
    loaded = ll.load_from_checkpoint(kind, tmp_path / "epoch=1.ckpt")
    assert not differences(dict(module.state_dict()), dict(loaded.state_dict()))


@pytest.mark.slow
def test_two_processes_prune_alike(tmp_path) -> None:
    names = ["auxiliary heads", "byol", "segmentation"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.structured.ddp_script", str(tmp_path), *names],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in names:
        first, second = (json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in (0, 1))
        assert first["shapes"] == second["shapes"] != {k: list(v) for k, v in shapes(PROJECTS[name]()).items()}
        assert first["sum"] == second["sum"]
