"""Read and reset the state of Lightning's own callbacks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_light.host.classes import is_host

__all__ = ["averaged_model", "reset_best"]


def averaged_model(callback: Any) -> nn.Module | None:
    """Return the averaged copy of the network that a callback keeps, or None.

    Lightning's ``WeightAveraging`` and ``StochasticWeightAveraging`` keep theirs under a private name; any other
    callback offers it as ``averaged_model``.
    """
    found = getattr(callback, "_average_model", getattr(callback, "averaged_model", None))
    return found.module if isinstance(found, AveragedModel) else found


def reset_best(callback: Any) -> bool:
    """Forget what a ``ModelCheckpoint`` or ``EarlyStopping`` compares with; return whether it is one.

    Files that are already written stay on disk.
    """
    if is_host(callback, "ModelCheckpoint") and callback.monitor is not None:
        callback.best_k_models.clear()
        callback.best_model_score = callback.current_score = None
        callback.best_model_path = callback.kth_best_model_path = ""
        callback.kth_value = _worst(callback.mode)
        return True
    if is_host(callback, "EarlyStopping"):
        callback.wait_count = 0
        callback.best_score = _worst(callback.mode)
        return True
    return False


def _worst(mode: str) -> torch.Tensor:
    return torch.tensor(math.inf if mode == "min" else -math.inf)
