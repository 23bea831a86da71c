"""Compute the progress of a run from the state of the Trainer, so that a resumed run continues where it was."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from lightning_light.host.classes import is_host
from lightning_light.host.trainer import callbacks_of, steps_done
from lightning_light.order import check_order

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "epochs_planned",
    "progress_at_step",
    "steps_done",
    "steps_before_epochs",
    "steps_planned",
    "time_before_epochs",
    "training_progress",
]


_MOMENTS = ("stop", "freeze_observers", "freeze_batch_norm")
_MOST_EPOCHS = 1000


def epochs_planned(trainer: Trainer) -> int | None:
    """Return ``max_epochs``; for ``fast_dev_run``, which replaces it by 1, the fewest epochs that hold all methods."""
    if not getattr(trainer, "fast_dev_run", False):
        return trainer.max_epochs
    methods = [each for each in callbacks_of(trainer) if hasattr(each, "last_change")]
    named = [getattr(each, name, 1) for each in methods for name in _MOMENTS]
    for epochs in range(max((each for each in named if isinstance(each, int)), default=1), _MOST_EPOCHS):
        with suppress(ValueError):  # an epoch after the end, or windows that overlap
            check_order([(type(each).__name__, each.stage, each.window(epochs)) for each in methods])
            return epochs
    return trainer.max_epochs


def steps_planned(trainer: Trainer) -> int:
    """Estimate the value of `steps_done` at the end of the run.

    With ``max_steps`` in manual optimization, Lightning counts the steps of every optimizer. How many there are per
    batch depends on the user's code: the estimate is their mean so far, and before the first batch one per optimizer.

    Raises:
        ValueError: the run has no planned end.
    """
    return _planned(trainer, _limits(trainer))


def training_progress(trainer: Trainer) -> float:
    """Return steps done / steps planned, in [0, 1]: 0 at the first batch, 1 after the last.

    At the start of the last batch it is ``1 - 1 / planned``, so what must be complete within the run has to be due
    before progress 1. In manual optimization with ``max_steps`` it is the larger fraction of the two limits.

    Raises:
        ValueError: the run has no planned end.
    """
    return _progress(trainer, _limits(trainer))


def progress_at_step(trainer: Trainer, ahead: int = 0) -> float:
    """Return `training_progress` ``ahead`` steps from now, and 1 at the start of the last step.

    For changes at the start of a step, of which there is none after the last.

    Raises:
        ValueError: the run has no planned end.
    """
    limits = _limits(trainer)
    planned = _planned(trainer, limits)
    if steps_done(trainer) + ahead + 1 >= planned:
        return 1.0
    return min(_progress(trainer, limits) + ahead / planned, 1.0)


def steps_before_epochs(trainer: Trainer) -> str:
    """Return a sentence on a run whose ``max_epochs`` is not reached under ``max_steps``; else nothing."""
    by_epochs, by_steps = _limits(trainer)
    by_steps /= _steps_per_batch(trainer)
    if math.isinf(by_epochs) or by_steps >= by_epochs:
        return ""
    return (
        f"`Trainer(max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps})`: the run ends after "
        f"{by_steps:.0f} of {by_epochs:.0f} steps, and schedules are fractions of these {by_steps:.0f}; an epoch "
        f"counts as 1 / {trainer.max_epochs} of them."
    )


def time_before_epochs(trainer: Trainer) -> str:
    """Return, after the first epoch of a run under ``max_time``, a sentence if it is too short for all steps."""
    timers: list[Any] = [each for each in callbacks_of(trainer) if is_host(each, "Timer")]
    timer, done = (timers or [None])[0], steps_done(trainer)
    left = timer and timer.time_remaining("train")
    if left is None or trainer.current_epoch != 1 or not done:
        return ""
    needed = timer.time_elapsed("train") / done * (steps_planned(trainer) - done)
    if needed <= left:
        return ""
    return (
        f"`Trainer(max_epochs={trainer.max_epochs}, max_time=...)`: expected time for {steps_planned(trainer)} steps, "
        f"of which schedules are fractions; found that at the pace of the first epoch {needed:.0f} s are needed and "
        f"{left:.0f} s remain. Plan a shorter run, or give more time: methods may be left incomplete."
    )


def _planned(trainer: Trainer, limits: tuple[float, float]) -> int:
    by_epochs, by_steps = limits
    return max(1, math.ceil(min(by_epochs, by_steps / _steps_per_batch(trainer))))


def _progress(trainer: Trainer, limits: tuple[float, float]) -> float:
    by_epochs, by_steps = limits
    counted = steps_done(trainer) if _counts_batches(trainer) else trainer.global_step
    return min(max(steps_done(trainer) / max(by_epochs, 1), counted / max(by_steps, 1)), 1.0)


def _limits(trainer: Trainer) -> tuple[float, float]:
    """Return the limits of the run, either may be infinite: by epochs, in batches that step; by optimizer steps."""
    if trainer.train_dataloader is None:
        _ = trainer.estimated_stepping_batches  # loads the training data
    by_steps = math.inf if trainer.max_steps == -1 else float(trainer.max_steps)
    by_epochs = math.inf
    if trainer.max_epochs not in (None, -1) and not math.isinf(trainer.num_training_batches):
        by_epochs = float(_steps_by_epochs(trainer, max(trainer.max_epochs or 0, 1)))
    if math.isinf(by_epochs) and math.isinf(by_steps):
        timed = any(is_host(callback, "Timer") for callback in callbacks_of(trainer))
        raise ValueError(
            f"`Trainer(max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps})`: expected a run with a planned "
            f"end, of which a schedule takes fractions; found {trainer.num_training_batches} batches per epoch"
            f"{', and `max_time`, which does not give a number of steps' if timed else ''}. Set `max_steps`, or "
            "`max_epochs` together with data of known length or `limit_train_batches`; `max_time` may be set beside it."
        )
    return by_epochs, by_steps


def _steps_by_epochs(trainer: Trainer, epochs: int) -> int:
    """Count the batches that step; the last of an epoch always does, and a callback may schedule accumulation."""
    batches = int(trainer.num_training_batches)
    for callback in callbacks_of(trainer):
        if is_host(callback, "GradientAccumulationScheduler"):
            counts = (callback.get_accumulate_grad_batches(epoch) for epoch in range(epochs))
            return sum(math.ceil(batches / count) for count in counts)
    return math.ceil(batches / trainer.accumulate_grad_batches) * epochs


def _counts_batches(trainer: Trainer) -> bool:
    module = trainer.lightning_module
    return module is None or module.automatic_optimization


def _steps_per_batch(trainer: Trainer) -> float:
    if _counts_batches(trainer):
        return 1.0
    done = steps_done(trainer)
    return trainer.global_step / done if done and trainer.global_step else float(max(1, len(trainer.optimizers)))
