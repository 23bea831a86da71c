"""Reset ``ModelCheckpoint``, ``EarlyStopping`` and ``ReduceLROnPlateau`` after a structural change."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_light.host.callbacks import reset_best
from lightning_light.host.trainer import callbacks_of
from lightning_light.surgery.distributed import log_rank_zero

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def reset_monitoring(trainer: Trainer) -> list[str]:
    """Forget the candidates of every ``ModelCheckpoint`` and the counters of callbacks that wait for improvement.

    Otherwise "best" is the network before compression, ``EarlyStopping`` stops at the drop after a cut, and
    ``ReduceLROnPlateau`` lowers the learning rate for it. Files already written stay on disk.

    Args:
        trainer: the Trainer.

    Returns:
        The class names of what was reset; one log line lists them, the first time.
    """
    reset = [type(callback).__name__ for callback in callbacks_of(trainer) if reset_best(callback)]
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, ReduceLROnPlateau):
            config.scheduler.best = math.inf if config.scheduler.mode == "min" else -math.inf
            config.scheduler.num_bad_epochs = 0
            reset.append(type(config.scheduler).__name__)
    if reset:
        log_rank_zero(
            trainer, f"The structure has changed: the best values of {', '.join(reset)} are reset.", once=True
        )
    return reset
