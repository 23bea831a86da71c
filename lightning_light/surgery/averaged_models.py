"""Averaged copies of the network (EMA, SWA), which have to change along with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.optim.swa_utils import AveragedModel

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def averaged_models_of(trainer: Trainer | None, pl_module: nn.Module) -> list[nn.Module]:
    """The copies of ``pl_module`` that Lightning's ``WeightAveraging`` and ``StochasticWeightAveraging`` keep.

    Both hold theirs as ``_average_model`` and pair its tensors with the live ones by position.

    Args:
        trainer: the Trainer; without one there are no copies.
        pl_module: the live module.
    """
    if trainer is None:
        return []
    held = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    copies = [model.module if isinstance(model, AveragedModel) else model for model in held]
    return [copy for copy in copies if isinstance(copy, type(pl_module)) and copy is not pl_module]
