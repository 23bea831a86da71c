"""How far a Trainer has come: read from its state, so that a resumed run goes on where it was."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning_light.host.classes import is_host

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["progress_at_step", "steps_done", "steps_planned", "training_progress"]


def steps_done(trainer: Trainer) -> int:
    """Batches after which the optimizers stepped, since the first fit: Lightning's own axis for loggers.

    Unlike ``trainer.global_step`` it does not count a batch twice for two optimizers in manual optimization, where
    every batch counts as one step. It moves on between ``on_train_batch_end`` and the next ``on_train_batch_start``.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def steps_planned(trainer: Trainer) -> int:
    """Steps on the axis of `steps_done` that the run will have taken at its end.

    With ``max_steps`` in manual optimization Lightning counts every optimizer's step, and how many a batch takes is
    the user's code's to know: taken is the mean so far, and before the first batch one step an optimizer.

    Raises:
        ValueError: the run has no planned end.
    """
    return _planned(trainer, _limits(trainer))


def training_progress(trainer: Trainer) -> float:
    """Steps done / steps planned, in [0, 1]; 0 at the first batch, 1 after the last.

    At the start of the last batch it is ``1 - 1 / planned``, so what must be complete within the run has to be due
    before progress 1. In manual optimization with ``max_steps`` it is the greater share of the two limits.

    Raises:
        ValueError: the run has no planned end.
    """
    return _progress(trainer, _limits(trainer))


def progress_at_step(trainer: Trainer, ahead: int = 0) -> float:
    """`training_progress` ``ahead`` steps from now, where the start of the last step counts as the end of the run.

    For what changes at the start of a step, of which none comes after the last.

    Raises:
        ValueError: the run has no planned end.
    """
    limits = _limits(trainer)
    planned = _planned(trainer, limits)
    if steps_done(trainer) + ahead + 1 >= planned:
        return 1.0
    return min(_progress(trainer, limits) + ahead / planned, 1.0)


def _planned(trainer: Trainer, limits: tuple[float, float]) -> int:
    by_epochs, by_steps = limits
    return max(1, math.ceil(min(by_epochs, by_steps / _steps_a_batch(trainer))))


def _progress(trainer: Trainer, limits: tuple[float, float]) -> float:
    by_epochs, by_steps = limits
    counted = steps_done(trainer) if _one_step_a_batch(trainer) else trainer.global_step
    return min(max(steps_done(trainer) / max(by_epochs, 1), counted / max(by_steps, 1)), 1.0)


def _limits(trainer: Trainer) -> tuple[float, float]:
    """The two ends of the run, either may be infinite: by epochs in batches that step, by steps of optimizers."""
    if trainer.train_dataloader is None:
        _ = trainer.estimated_stepping_batches  # loads the training data
    by_steps = math.inf if trainer.max_steps == -1 else float(trainer.max_steps)
    by_epochs = math.inf
    if trainer.max_epochs not in (None, -1) and not math.isinf(trainer.num_training_batches):
        by_epochs = float(_steps_by_epochs(trainer, max(trainer.max_epochs or 0, 1)))
    if math.isinf(by_epochs) and math.isinf(by_steps):
        raise ValueError(
            f"`Trainer(max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps})`: expected a run with a planned "
            f"end, found {trainer.estimated_stepping_batches} steps and {trainer.num_training_batches} batches an "
            "epoch. Set `max_steps`, or `max_epochs` together with data of known length or `limit_train_batches`."
        )
    return by_epochs, by_steps


def _steps_by_epochs(trainer: Trainer, epochs: int) -> int:
    """The last batch of an epoch always steps; a `GradientAccumulationScheduler` may change the count."""
    batches = int(trainer.num_training_batches)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by Lightning's callback connector
        if is_host(callback, "GradientAccumulationScheduler"):
            counts = (callback.get_accumulate_grad_batches(epoch) for epoch in range(epochs))
            return sum(math.ceil(batches / count) for count in counts)
    return math.ceil(batches / trainer.accumulate_grad_batches) * epochs


def _one_step_a_batch(trainer: Trainer) -> bool:
    module = trainer.lightning_module
    return module is None or module.automatic_optimization


def _steps_a_batch(trainer: Trainer) -> float:
    if _one_step_a_batch(trainer):
        return 1.0
    done = steps_done(trainer)
    return trainer.global_step / done if done and trainer.global_step else float(max(1, len(trainer.optimizers)))
