"""After a change of structure the race for the best checkpoint starts anew."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_light.host.classes import is_host
from lightning_light.surgery.distributed import log_rank_zero

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def reset_monitoring(trainer: Trainer) -> list[str]:
    """Forget the candidates of every ``ModelCheckpoint`` and the counters of those who wait for improvement.

    Otherwise "best" is the network before compression, ``EarlyStopping`` takes the dip after a cut for the end of
    learning, and ``ReduceLROnPlateau`` lowers the rate for it. Files already written stay on disk.

    Args:
        trainer: the Trainer.

    Returns:
        The class names of what was restarted; one log line says the same.
    """
    restarted = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # an attribute set by a connector
        if is_host(callback, "ModelCheckpoint") and callback.monitor is not None:
            _restart_checkpoint(callback)
        elif is_host(callback, "EarlyStopping"):
            callback.wait_count = 0
            callback.best_score = _worst(callback.mode)
        else:
            continue
        restarted.append(type(callback).__name__)
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, ReduceLROnPlateau):
            _restart_plateau(config.scheduler)
            restarted.append(type(config.scheduler).__name__)
    if restarted:
        log_rank_zero(
            trainer, f"The structure has changed: {', '.join(restarted)} compare from here on, not with before."
        )
    return restarted


def _worst(mode: str) -> torch.Tensor:
    return torch.tensor(math.inf if mode == "min" else -math.inf)


def _restart_checkpoint(checkpoint: Any) -> None:
    checkpoint.best_k_models.clear()
    checkpoint.best_model_score = checkpoint.current_score = None
    checkpoint.best_model_path = checkpoint.kth_best_model_path = ""
    checkpoint.kth_value = _worst(checkpoint.mode)


def _restart_plateau(scheduler: ReduceLROnPlateau) -> None:
    scheduler.best = math.inf if scheduler.mode == "min" else -math.inf
    scheduler.num_bad_epochs = 0
