"""Masks in the compression state: which of them the weights still satisfy."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["drop_false_masks", "true_masks"]


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


def _drop_other_shapes(model: nn.Module, per_weight: Mapping[str, dict[str, Tensor]]) -> None:
    """Remove tensors that belong to weights, or buffers, which a run without their method has cut or replaced."""
    live = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for tensors in per_weight.values():
        for name in [name for name in tensors if name not in live or live[name].shape != tensors[name].shape]:
            del tensors[name]


def drop_false_masks(model: nn.Module, states: Mapping[str, dict[str, Any]]) -> list[str]:
    """Remove masks that no longer hold from the states of the methods, and warn.

    Args:
        model: the module.
        states: method name -> its state; masks are under ``masks``.

    Returns:
        The methods that have no mask any more.
    """
    emptied = []
    for method, state in states.items():
        masks: dict[str, Tensor] = state.get("masks", {})
        _drop_other_shapes(model, state.get("per_weight", {}))
        found = true_masks(model, masks)
        if len(found) == len(masks):
            continue
        names = [name for name in masks if name not in found]
        warnings.warn(
            f"The masks of `{method}` no longer hold on {len(names)} weights, {names[:3]}, which were trained without "
            "its callback and are nonzero again: this checkpoint is written without these masks. Keep the callback in "
            "`Trainer(callbacks=...)` while training.",
            stacklevel=2,
        )
        state["masks"] = found
        if not found:
            emptied.append(method)
    return emptied
