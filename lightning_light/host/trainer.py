"""Read the state of a Trainer that Lightning keeps under private names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning_light.host.classes import host_class
from lightning_light.host.patches import wrap_method

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "callbacks_of",
    "is_accumulating",
    "is_backward_skipped",
    "is_restoring",
    "returns_weights",
    "shards_parameters",
    "silent_loggers",
    "start_method",
    "start_with_an_epoch",
    "steps_done",
]

_LAUNCHERS_THAT_RETURN_WEIGHTS = ("_MultiProcessingLauncher", "_XLALauncher")


def callbacks_of(trainer: Trainer) -> list[Any]:
    """Return the callbacks of ``trainer``."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    return callbacks


def steps_done(trainer: Trainer) -> int:
    """Count the batches after which the optimizers stepped since the first fit: Lightning's own axis for loggers.

    Unlike ``trainer.global_step`` it does not count a batch twice for two optimizers in manual optimization, where
    every batch counts as one step. It advances between ``on_train_batch_end`` and the next ``on_train_batch_start``.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def is_restoring(trainer: Trainer) -> bool:
    """Check whether a checkpoint is being restored: True in ``on_fit_start`` of a resumed fit, until all is loaded."""
    return bool(trainer._checkpoint_connector._loaded_checkpoint)


def is_accumulating(trainer: Trainer) -> bool:
    """Check whether the gradients of this batch are accumulated, so that no optimizer steps after it."""
    automatic = trainer.lightning_module is None or trainer.lightning_module.automatic_optimization
    return automatic and trainer.fit_loop._should_accumulate()


def is_backward_skipped(trainer: Trainer) -> bool:
    """Check whether Lightning runs the epoch for batch-norm statistics alone, after stochastic weight averaging."""
    return bool(getattr(trainer.fit_loop, "_skip_backward", False))


def shards_parameters(trainer: Trainer) -> bool:
    """Check whether the strategy shards or owns the parameters (FSDP, ModelParallel, DeepSpeed)."""
    strategy = trainer.strategy
    return strategy.restore_checkpoint_after_setup or not strategy.lightning_restore_optimizer


def returns_weights(trainer: Trainer) -> bool:
    """Check whether the launcher loads the trained weights into the process that called ``fit`` (spawn, fork)."""
    launchers = {cls.__name__ for cls in type(trainer.strategy.launcher).__mro__}
    return bool(launchers.intersection(_LAUNCHERS_THAT_RETURN_WEIGHTS))


def start_method(trainer: Trainer) -> str:
    """Name how the launcher starts processes: ``spawn``, ``fork``, ``forkserver``."""
    return str(getattr(trainer.strategy.launcher, "_start_method", "spawn"))


def start_with_an_epoch(trainer: Trainer) -> None:
    """Let a run that is resumed from a checkpoint of ``on_train_epoch_start`` begin with that epoch.

    Lightning would skip it: the counters of batches are still those of the previous epoch. Call it in ``on_fit_start``.
    """
    loop: Any = trainer.fit_loop

    def load(load_state_dict: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        load_state_dict(*args, **kwargs)
        for progress in (loop.epoch_progress.current, loop.epoch_progress.total):
            progress.ready = progress.started
        loop._restarting = loop.epoch_loop.restarting = False

    wrap_method(loop, "load_state_dict", load)


@contextmanager
def silent_loggers(trainer: Trainer | None) -> Iterator[None]:
    """Replace the loggers of ``trainer`` by Lightning's own that take everything and write nothing."""
    if trainer is None:
        yield
        return
    before = trainer.loggers
    trainer.loggers = [host_class(trainer, "loggers.logger.DummyLogger")() for _ in before]
    try:
        yield
    finally:
        trainer.loggers = before
