"""Every way of training that Lightning has: precision, accumulation, clipping, optimizers, layers, beside averaging."""

from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision

from lightning_light.surgery.averaged_models import averaged_models_of
from tests.contract.bodies import Body, Compiled, FrozenBackbone, MadeLate, Tied, TwoOptimizers, Wrapped
from tests.contract.case import Case
from tests.contract.runs import (
    assert_changed,
    checkpoints,
    differences,
    module_of,
    outcome,
    shapes,
    trainer,
    unless_refused,
)
from tests.contract.table import FULL

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf"
    ),  # of dynamo, at a graph break
    pytest.mark.parametrize("case", FULL),
]

PRECISIONS: dict[str, Any] = {
    "bf16": lambda: {"precision": "bf16-mixed"},
    "fp16": lambda: {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]},
    "double": lambda: {"precision": "64-true"},
    "accumulation": lambda: {"accumulate_grad_batches": 2},
    "clipping": lambda: {"gradient_clip_val": 0.5},
}


def fitted(case: Case, folder: Path, body: type[Body] | None = None, *beside: Any, **options: Any) -> tuple[Any, Any]:
    """A whole run, whose losses are numbers; returns the Trainer and the module."""
    torch.manual_seed(3)
    module = module_of(case, body)
    run = trainer(*beside, *case.build(folder), **options)
    run.fit(module, ckpt_path=None)
    assert torch.tensor(module.losses).isfinite().all()
    return run, module


@pytest.mark.parametrize("how", list(PRECISIONS))
def test_fits_and_resumes_in_any_precision_with_accumulation_and_clipping(case, how, tmp_path) -> None:
    with unless_refused(case, how):
        run, module = fitted(case, tmp_path, None, *checkpoints(tmp_path, every=3), **PRECISIONS[how]())
        assert_changed(case, module)
        for parameter, state in run.optimizers[0].state.items():
            moments = [value for value in state.values() if value.ndim]
            assert all(value.shape == parameter.shape for value in moments)
        if how in ("bf16", "fp16", "accumulation"):
            resumed = module_of(case)
            again = trainer(*case.build(tmp_path / "again"), **PRECISIONS[how]())
            again.fit(resumed, ckpt_path=tmp_path / f"step={run.global_step // 2}.ckpt")
            assert not differences(outcome(run, module), outcome(again, resumed))


BODIES = {
    "manual": TwoOptimizers,
    "frozen": FrozenBackbone,
    "tied": Tied,
    "configure_model": MadeLate,
    "compiled": Compiled,
    "wrapped": Wrapped,
}


@pytest.mark.parametrize("what", list(BODIES))
def test_models_and_optimizers_of_every_kind(case, what, tmp_path) -> None:
    with unless_refused(case, what):
        run, module = fitted(case, tmp_path, BODIES[what], *checkpoints(tmp_path, every=6))
        assert_changed(case, module, BODIES[what])
        resumed = module_of(case, BODIES[what])
        again = trainer(*case.build(tmp_path / "again"))
        again.fit(resumed, ckpt_path=tmp_path / "step=6.ckpt" if what != "manual" else tmp_path / "step=12.ckpt")
        assert not differences(outcome(run, module), outcome(again, resumed))
        if what == "frozen":
            learning = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
            assert not learning.get("features.stem.weight", False)
            assert learning.get("features.last.weight", True)
        if what == "tied":
            assert module.alias is module.features.conv1
            assert getattr(module.first, "weight", 0) is getattr(module.second, "weight", 0)


def averaging(kind: str) -> Any:
    if kind == "ema":
        return EMAWeightAveraging(decay=0.9)
    return StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1)


class CopiesFollow(lightning.pytorch.Callback):
    """Notes after every step whether the averaged models have the shapes of the live one."""

    def __init__(self) -> None:
        self.equal: list[bool] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.equal += [shapes(pl_module) == shapes(copied) for copied in averaged_models_of(trainer, pl_module)]


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("kind", ["ema", "swa"])
@pytest.mark.filterwarnings("ignore:Swapping scheduler:UserWarning")
def test_averaged_copies_follow_and_resume(case, kind, order, tmp_path) -> None:
    with unless_refused(case, kind):
        ends, look = [], CopiesFollow()
        for resume in (None, tmp_path / "step=6.ckpt") if kind == "ema" else (None,):
            torch.manual_seed(3)
            callbacks, saving = case.build(tmp_path), [] if resume else checkpoints(tmp_path, every=6)
            both = [averaging(kind), *callbacks] if order == "before" else [*callbacks, averaging(kind)]
            module = module_of(case)
            run = trainer(*both, look, *saving)
            run.fit(module, ckpt_path=resume)
            assert_changed(case, module)
            assert torch.isfinite(module(next(iter(module.train_dataloader()))[0])).all()
            ends.append(outcome(run, module))
        assert look.equal
        assert all(look.equal)
        assert not differences(ends[0], ends[-1])
