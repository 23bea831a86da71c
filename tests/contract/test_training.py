"""Every way of training that Lightning has: precision, accumulation, clipping, optimizers, layers, beside averaging."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision

from lightning_light.errors import ManifestError, UnsupportedError
from lightning_light.surgery.averaged_models import averaged_models_of
from tests.contract.bodies import Body, Compiled, FrozenBackbone, Lazy, MadeLate, Tied, TwoOptimizers, Wrapped
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


BODIES = {
    "manual": TwoOptimizers,
    "configure_model": MadeLate,
    "frozen": FrozenBackbone,
    "tied": Tied,
    "compiled": Compiled,
    "wrapped": Wrapped,
}


def pairs() -> Iterator[Any]:
    """Every row with every body and with every precision, two at a time; which two changes from row to row.

    What Lightning refuses or cannot resume stays out: manual optimization with accumulation or clipping, and double
    precision in layers that are made before the fit, which Lightning restores in single precision. The own body of a
    row stands for the bodies that it refuses. Of the two ways to compile, a row resumes one.
    """
    fixed = {"manual": None, "configure_model": "double"}
    for number, row in enumerate(FULL):
        hows = [how for how in PRECISIONS if how != "double"]
        turned = [*hows[number % len(hows) :], *hows[: number % len(hows)]]
        together = fixed | dict(zip([what for what in BODIES if what not in fixed], turned, strict=True))
        for what, how in together.items():
            refused = what in row.values[0].refuses
            for one in [(what, None), (None, how)] if refused and how else [(what, how)]:
                resumes = one not in ((None, "double"), (("compiled", "wrapped")[number % 2], how))
                name = "-".join(filter(None, [row.id, *one]))
                yield pytest.param(*row.values, *one, resumes, id=name, marks=row.marks)


@pytest.mark.parametrize(("case", "what", "how", "resumes"), list(pairs()))
def test_fits_and_resumes_with_every_body_and_in_every_precision(case, what, how, resumes, tmp_path) -> None:
    body, options = BODIES.get(what), PRECISIONS.get(how, dict)
    with unless_refused(case, what):
        run, module = fitted(case, tmp_path, body, *checkpoints(tmp_path, every=3), **options())
        assert_changed(case, module, body)
        for parameter, state in itertools.chain(*(optimizer.state.items() for optimizer in run.optimizers)):
            assert all(value.shape == parameter.shape for value in state.values() if value.ndim)
        if what == "frozen":
            learning = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
            assert not learning.get("features.stem.weight", False)
            assert learning.get("features.last.weight", True)
        if what == "tied":
            assert module.alias is module.features.conv1
            assert getattr(module.first, "weight", 0) is getattr(module.second, "weight", 0)
        if resumes:
            resumed = module_of(case, body)
            again = trainer(*case.build(tmp_path / "again"), **options())
            again.fit(resumed, ckpt_path=tmp_path / f"step={run.global_step // 2}.ckpt")
            assert not differences(outcome(run, module), outcome(again, resumed))


@pytest.mark.parametrize("case", FULL)
def test_layers_may_learn_their_shapes_in_the_first_step(case, tmp_path) -> None:
    own: Any = case.body
    body = Lazy if own is Body else type("Lazy", (Lazy, own), {})
    if case.name == "distillation_self":  # from a copy that is made before
        module = module_of(case, body)
        with pytest.raises(UnsupportedError, match=r"found lazy ones.*Call the module once before `trainer.fit`"):
            trainer(*case.build(tmp_path)).fit(module)
        return
    ends = []
    for resume in (None, tmp_path / "step=6.ckpt"):
        torch.manual_seed(3)
        module = module_of(case, body)
        saving = [] if resume else checkpoints(tmp_path, every=6)
        run = trainer(*case.build(tmp_path / ("again" if resume else "")), *saving)
        if resume and "head.0.weight" in ends[0]["weights"]:  # in factors; the checkpoint does not have its shape
            with pytest.raises(ManifestError, match=r"`head` of `Lazy.*Call the module on a batch before loading"):
                run.fit(module, ckpt_path=resume)
            module = module_of(case, body)
            module(next(iter(module.train_dataloader()))[0])
            run = trainer(*case.build(tmp_path / "once more"))
        run.fit(module, ckpt_path=resume)
        assert_changed(case, module, body)
        ends.append(outcome(run, module))
    assert not differences(*ends)


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


def orders() -> Iterator[Any]:
    """Every row with both kinds of averaging and in both orders; which kind comes first changes from row to row."""
    for number, row in enumerate(FULL):
        for turn, (kind, order) in enumerate(
            [("ema", "before"), ("swa", "after"), ("swa", "before"), ("ema", "after")]
        ):
            marks = row.marks if number % 2 == turn // 2 else [pytest.mark.slow]
            yield pytest.param(*row.values, kind, order, id=f"{row.id}-{kind}-{order}", marks=marks)


@pytest.mark.parametrize(("case", "kind", "order"), list(orders()))
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


@pytest.mark.parametrize("case", [row for row in FULL if row.values[0].structural and row.values[0].body is Body])
def test_a_copy_that_was_made_before_the_layers_is_refused_before_training(case, tmp_path) -> None:
    module = module_of(case, MadeLate)
    with pytest.raises(UnsupportedError, match=r"found none named `features.stem.weight`.*EMAWeightAveraging"):
        trainer(averaging("swa"), *case.build(tmp_path)).fit(module)
    assert not module.losses
