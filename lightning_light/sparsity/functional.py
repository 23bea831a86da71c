"""Mask a network outside a Trainer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_light.sparsity.gather import score_weights
from lightning_light.sparsity.mask_enforcer import mask_model
from lightning_light.sparsity.plan import check_pattern, plan_masks
from lightning_light.sparsity.weight_pruning import WeightPruning
from lightning_light.sparsity.weights import find_weights
from lightning_light.targets import as_targets

__all__ = ["prune_weights"]


def prune_weights(model: nn.Module, *, pruning: WeightPruning) -> dict[str, Tensor]:
    """Set weights of ``model`` to zero in one shot, in place, as the callback ``pruning`` would at its last change.

    Nothing keeps them at zero if the model is trained on: for that, use the callback.

    Args:
        model: any module.
        pruning: says how many and which; its schedule does not count.

    Returns:
        Parameter name -> mask, True where a weight stayed.

    Raises:
        ValueError: the criterion needs what only training gathers.
        TargetError: the targets name nothing, or a layer that the pattern does not divide.
        BudgetError: a layer would lose every weight.

    Example:
        >>> from lightning_light.sparsity import NM, prune_weights
        >>> layer = nn.Linear(8, 4)
        >>> masks = prune_weights(layer, pruning=WeightPruning(pattern=NM(2, 4)))
        >>> int(layer.weight.count_nonzero()), int(masks["weight"].sum())
        (16, 16)
    """
    if pruning.criterion.needs - {"generator"}:
        raise ValueError(
            f"`prune_weights(pruning={pruning!r})`: expected a criterion that reads weights alone, found one that "
            f"needs {sorted(pruning.criterion.needs)}. Use the callback in a Trainer, or `criterion=Magnitude()`."
        )
    weights = find_weights(model, as_targets(pruning.targets), "prune_weights")
    check_pattern("prune_weights", weights, pruning.pattern)
    own: dict[str, float] = {}
    for pattern, amount in (pruning.amounts or {}).items():
        layers = as_targets(pattern).select(model)
        own |= {weight.name: amount for weight in weights if weight.layer in layers}
    scores = score_weights(
        weights,
        pruning.criterion,
        sums={},
        steps=0,
        movement={},
        values={},
        reduce=lambda tensor: tensor,
        generator=torch.Generator().manual_seed(pruning.seed),
    )
    masks = plan_masks(
        weights,
        scores,
        pattern=pruning.pattern,
        scope=pruning.scope,
        share=1.0,
        amounts=own,
        current={},
        amount=0.0 if pruning.budget is None else pruning.budget.goal(0.0),
    )
    mask_model(model, masks)
    return masks
