"""A distilled step is the hand-written one to the last bit, however it is trained."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from lightning_light.distillation import KnowledgeDistillation, SoftTargets
from tests.distillation.runs import TEMPERATURE, WEIGHT, ByHand, Plain, fitted, mentor, weights


def distillation() -> KnowledgeDistillation:
    return KnowledgeDistillation(mentor, losses=[SoftTargets(weight=WEIGHT, temperature=TEMPERATURE)])


def scaled() -> dict[str, Any]:
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]}


HOW: dict[str, tuple[dict[str, Any], Any]] = {
    "plain": ({}, dict),
    "dict_output": ({"dict_out": True}, dict),
    "accumulation": ({}, lambda: {"accumulate_grad_batches": 4}),
    "clipping": ({}, lambda: {"gradient_clip_val": 0.3}),
    "bf16": ({}, lambda: {"precision": "bf16-mixed"}),
    "bf16_true": ({}, lambda: {"precision": "bf16-true"}),
    "double": ({}, lambda: {"precision": "64-true"}),
    "fp16": ({}, scaled),
    "fp16_accumulation": ({}, lambda: {**scaled(), "accumulate_grad_batches": 4}),
    "manual": ({"manual": True}, dict),
    "manual_bf16": ({"manual": True}, lambda: {"precision": "bf16-mixed"}),
    "manual_fp16": ({"manual": True}, scaled),
}


@pytest.mark.parametrize("how", list(HOW))
def test_equals_hand_written_distillation(how: str) -> None:
    arguments, options = HOW[how]
    by_hand = fitted(ByHand(**arguments), **options())
    ours = fitted(Plain(**arguments), distillation(), **options())
    without = fitted(Plain(**arguments), **options())
    assert torch.equal(weights(by_hand), weights(ours))
    assert not torch.equal(weights(without), weights(ours))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_find_unused_parameters_true"])
def test_equals_hand_written_distillation_on_two_ranks_with_equal_projectors(strategy: str, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    subprocess.run(
        [sys.executable, "-m", "tests.distillation.ddp_script", strategy, str(tmp_path)],
        check=True,
        cwd=root,
        env=environment,
        timeout=240,
        capture_output=True,
    )
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert all(found.pop(name) is True for name in ("learned", "resumed"))
        assert found == dict.fromkeys(
            ("by_hand", "apart", "projector_apart", "accumulated", "accumulated_projector"), 0.0
        )
