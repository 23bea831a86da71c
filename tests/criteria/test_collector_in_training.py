"""Evidence gathered by a callback in a real run: the same after an interruption, a cut, and on two ranks."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from lightning_light.criteria.gathered import KINDS
from lightning_light.surgery.attachment import state_of
from tests.criteria.gathering import Gather
from tests.surgery.runs import HOSTS, MODULES, Lit, Loader, same, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*dataloader' does not have many workers",
    "ignore:.*LeafSpec:FutureWarning",
    "ignore:Be aware that when using `ckpt_path`",
)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str)
def test_a_run_interrupted_while_gathering_resumes_bit_for_bit(host: Any, options: Any, tmp_path: Path) -> None:
    """Steps 2 to 8 are gathered, with validation in between, and channels are cut at step 5."""
    saves = host.callbacks.ModelCheckpoint(
        tmp_path, "{step}", auto_insert_metric_name=False, save_top_k=-1, every_n_train_steps=1
    )
    whole = MODULES[host]()
    trainer(Gather(), saves, host=host, max_steps=9, max_epochs=-1, **options).fit(whole, Loader())
    found = state_of(whole).state["gather"]
    assert {kind for kind in KINDS if found["evidence"].get(kind)} == KINDS
    for step in range(1, 9):
        resumed = MODULES[host]()
        second = trainer(Gather(), host=host, max_steps=9, max_epochs=-1, **options)
        second.fit(resumed, Loader(), ckpt_path=tmp_path / f"{step}.ckpt")
        assert same(state_of(resumed).state["gather"], found), step
        assert same(resumed.state_dict(), whole.state_dict()), step
    for module in (whole, *whole.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_gradients_are_those_of_the_optimizer_before_clipping() -> None:
    module, seen = Lit("sgd"), []

    class Look(Gather):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            seen.append(pl_module.net.fc.weight.grad.clone())

    trainer(Look(start=0, cut_at=None), max_steps=3, gradient_clip_val=1e-3).fit(module, Loader())
    entry = state_of(module).state["gather"]["evidence"]["grad"]["net.fc.weight"]
    assert entry["count"] == len(seen) == 3
    assert torch.allclose(entry["total"], torch.stack(seen).sum(0), rtol=1e-5)
    assert entry["total"].norm() > 1e-2


@pytest.mark.parametrize("scale", [2.0**10, 2.0**40])
def test_gradients_of_float16_are_unscaled_and_overflows_left_out(scale: float) -> None:
    """A scale of 2^40 overflows until the scaler has halved it often enough."""
    module, steps = Lit("sgd"), 8
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=2.0**-10)
    gather = Gather(start=0, cut_at=None)
    plain = copy.deepcopy(module)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    trainer(gather, max_steps=steps, max_epochs=-1, plugins=[precision]).fit(module, Loader())
    batch = next(iter(Loader()))
    plain.training_step(batch, 0).backward()
    entry = state_of(module).state["gather"]["evidence"]["grad"]["net.fc.weight"]
    overflows = steps - int(entry["count"])
    assert (overflows > 0) == (scale > 2.0**16)
    mean, expected = entry["total"] / entry["count"], plain.net.fc.weight.grad
    assert torch.isfinite(entry["total"]).all()
    assert 0.1 < mean.norm() / expected.norm() < 10.0


@pytest.mark.slow
def test_two_ranks_gather_the_same(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.criteria.gathering", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "MASTER_PORT")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    files = [tmp_path / f"rank{rank}.pt" for rank in (0, 1)]
    assert all(file.exists() for file in files), done.stderr[-3000:]
    first, second = (torch.load(file, weights_only=True) for file in files)
    assert same(first, second)
    assert json.dumps(sorted(first)) == json.dumps(sorted({*KINDS, "batches"}))
    assert isinstance(first["inputs"]["net.fc"]["total"], Tensor)
