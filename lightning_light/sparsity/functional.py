"""Mask the weights of a network in one shot, without a Trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_light.budgets import Budget, Sparsity
from lightning_light.criteria.data import evidence_for
from lightning_light.criteria.evidence import Criterion
from lightning_light.example_input import ExampleInput
from lightning_light.helper_networks import helper_networks
from lightning_light.order import Stage
from lightning_light.sparsity.mask_enforcer import mask_model
from lightning_light.sparsity.options import WeightPruningOptions
from lightning_light.sparsity.patterns import Pattern
from lightning_light.sparsity.planning import plan_pruning
from lightning_light.sparsity.scope import Scope
from lightning_light.sparsity.scores import score_weights
from lightning_light.surgery.attachment import check_owners
from lightning_light.targets import TargetsLike, as_targets
from lightning_light.trained_weights import uncovered_parameters, uncovered_text
from lightning_light.validation import OpenFraction, PositiveInt, validated

__all__ = ["prune_weights"]

_LOGGER = logging.getLogger(__name__)


@validated
def prune_weights(
    model: nn.Module,
    example_inputs: Any = None,
    budget: Sparsity | None = WeightPruningOptions.budget,
    *,
    criterion: Criterion = WeightPruningOptions.criterion,
    pattern: Pattern = WeightPruningOptions.pattern,
    scope: Scope = WeightPruningOptions.scope,
    targets: TargetsLike = WeightPruningOptions.targets,
    remaining: dict[str, OpenFraction] | None = WeightPruningOptions.remaining,
    data: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    calibration_batches: PositiveInt = WeightPruningOptions.calibration_batches,
    seed: int = WeightPruningOptions.seed,
) -> dict[str, Tensor]:
    """Mask the least important weights of ``model`` in one shot, in place.

    Training on lets masked weights become nonzero again: for that, use `WeightPruning`.

    Args:
        model: any module.
        example_inputs: of one call; frozen parts of the model that it does not call are left alone. None: all count.
        budget: ``Sparsity(amount)`` of the targets' weights. None with `NM`, which determines it, or ``remaining``.
        criterion: scores weights; the lowest scores are masked first.
        pattern: what is masked together.
        scope: how the sparsity is distributed over the layers.
        targets: layers whose weights may be masked: patterns or `Targets`.
        remaining: layer pattern -> fraction of its weights that remain, in (0, 1]; overrides the budget there.
        data: batches, for a criterion that needs evidence.
        loss: ``loss(output, batch)``, for a criterion that needs gradients; a LightningModule's ``training_step`` by
            default.
        calibration_batches: number of batches of ``data``.
        seed: for criteria that draw random numbers.

    Returns:
        Parameter name -> mask, True where a weight remains.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an argument out of range, arguments that contradict each other, or no ``data`` for a criterion that
            needs it.
        TargetError: the targets match nothing, or a layer that the pattern does not divide.
        BudgetError: the budget leaves a layer without weights.
        UnsupportedError: evidence that a layer cannot give; a layer that a later method owns.

    Example:
        >>> from lightning_light.sparsity import NM, prune_weights
        >>> layer = nn.Linear(8, 4)
        >>> masks = prune_weights(layer, pattern=NM(2, 4))
        >>> int(layer.weight.count_nonzero()), int(masks["weight"].sum())
        (16, 16)
    """
    if isinstance(example_inputs, Budget):
        raise TypeError(
            f"`prune_weights(model, {example_inputs!r})`: expected the budget after the example inputs, found it in "
            f"their place. Write `prune_weights(model, None, {example_inputs!r})`."
        )
    options = WeightPruningOptions(budget, criterion, pattern, scope, targets, remaining, calibration_batches, seed)
    options.check("prune_weights")
    helpers = [] if example_inputs is None else helper_networks(model, ExampleInput.of(example_inputs))
    if helpers:
        _LOGGER.info("prune_weights: left alone, frozen and not called: %s", helpers)
    plan = plan_pruning("prune_weights", model, options, helpers)
    if uncovered := uncovered_parameters(model, as_targets(targets), (weight.parameter for weight in plan.weights)):
        _LOGGER.info("prune_weights: %s", uncovered_text(uncovered))
    layers = [weight.layer for weight in plan.weights]
    check_owners(model, layers, method="prune_weights", stage=Stage.MASKS)
    gathered = evidence_for(
        "prune_weights", model, criterion, data, batches=calibration_batches, loss=loss, layers=layers
    )
    generator = torch.Generator().manual_seed(seed)
    masks = plan.masks(score_weights(plan.weights, criterion, gathered, generator), 1.0)
    mask_model(model, masks)
    return masks
