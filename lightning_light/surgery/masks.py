"""Masks in the compression state: which of them the weights still satisfy."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["true_masks"]


def true_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the ``masks`` (by parameter name) that hold: every masked weight of ``model`` is zero.

    Weights that were trained on without the method that masks them are nonzero again.

    Example:
        >>> masks = {"weight": torch.tensor([[True, False]])}
        >>> layer = nn.Linear(2, 1)
        >>> list(true_masks(layer, masks))
        []
        >>> layer.weight.data *= masks["weight"]
        >>> list(true_masks(layer, masks))
        ['weight']
    """
    parameters = dict(model.named_parameters())
    return {
        name: mask
        for name, mask in masks.items()
        if name in parameters
        and parameters[name].shape == mask.shape
        and not torch.count_nonzero(parameters[name].detach()[~mask.to(parameters[name].device)])
    }
