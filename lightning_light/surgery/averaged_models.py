"""Find the averaged copies of a network (EMA, SWA)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from lightning_light.host.callbacks import averaged_model
from lightning_light.host.trainer import callbacks_of

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def averaged_models_of(trainer: Trainer | None, pl_module: nn.Module) -> list[nn.Module]:
    """Return the averaged copies of ``pl_module`` that callbacks keep (EMA, SWA, a teacher that follows the student).

    Each pairs its tensors with those of the live module by position, so it has to change with it.

    Args:
        trainer: the Trainer; without one there are no copies.
        pl_module: the live module.
    """
    models = [] if trainer is None else [averaged_model(callback) for callback in callbacks_of(trainer)]
    return [model for model in models if isinstance(model, type(pl_module)) and model is not pl_module]
