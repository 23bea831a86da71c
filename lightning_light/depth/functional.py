"""Prune residual blocks without a Trainer."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_light.batch_norm import measure_statistics, move_statistics
from lightning_light.budgets import Budget, require_reducible
from lightning_light.calibration import calls_from
from lightning_light.depth.blocks import remove_blocks
from lightning_light.depth.criteria import BlockCriterion
from lightning_light.depth.options import DepthPruningOptions
from lightning_light.depth.plan import DepthPlan, check_budget, plan_blocks
from lightning_light.example_input import ExampleInput
from lightning_light.measure.latency_table import LatencyTable, quantity
from lightning_light.surgery.attachment import recording, state_of
from lightning_light.targets import Targets
from lightning_light.validation import PositiveInt, validated

__all__ = ["prune_blocks"]


@validated
def prune_blocks(
    model: nn.Module,
    example_inputs: Any,
    budget: Budget,
    *,
    criterion: BlockCriterion = DepthPruningOptions.criterion,
    targets: Targets | str | list[str] | None = DepthPruningOptions.targets,
    data: Iterable[Any] | None = None,
    calibration_batches: PositiveInt = DepthPruningOptions.calibration_batches,
    correct_batch_norm: bool = DepthPruningOptions.correct_batch_norm,
    optimizers: Iterable[Optimizer] = (),
    dry_run: bool = False,
) -> DepthPlan:
    """Remove the least important residual blocks of ``model``, in place, until the budget is met.

    Args:
        model: any module.
        example_inputs: what ``model`` is called with: a tensor, a tuple of positional arguments or a dict of keyword
            arguments.
        budget: what the model is to reach. A relative budget counts from the model before its first compression by
            this package.
        criterion: `OutputChange` or `BlockInfluence`: the block with the lowest score is removed first.
        targets: residual blocks that may be removed: patterns or `Targets`; all by default.
        data: batches; of a tuple or list the first item is the model's input, a mapping is its keyword arguments. The
            example inputs by default.
        calibration_batches: how many batches of ``data`` are used.
        correct_batch_norm: move the batch-norm statistics by what the removal did to them.
        optimizers: the parameters of removed blocks leave them.
        dry_run: only plan.

    Returns:
        What was removed, the scores, and why other modules were kept.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
        BudgetError: the budget cannot be reached; the model is unchanged.
        TargetError: ``targets`` match no module.
        UnsupportedError: a layer of a block was changed by a later method, for instance quantized.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_light import Params
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, norm_first=True, batch_first=True)
        >>> model = nn.TransformerEncoder(layer, num_layers=4, enable_nested_tensor=False)
        >>> plan = prune_blocks(model, torch.randn(2, 5, 8), Params(0.5))
        >>> len(plan.removed), plan.after / plan.before
        (2, 0.5)
    """
    require_reducible("prune_blocks", budget, "channels")
    options = DepthPruningOptions(criterion, targets, calibration_batches, correct_batch_norm)
    example = ExampleInput.of(example_inputs).to(model)
    batches = list(calls_from("prune_blocks", model, example_inputs, data, limit=calibration_batches))
    measure = partial(quantity, budget, model, example, LatencyTable.of(budget))
    dense = state_of(model).reference(budget.quantity, measure)
    goal = budget.goal(dense)
    blocks = check_budget(model, budget, example, options, goal, measure)
    plan = plan_blocks(model, blocks, criterion, batches, goal, measure)
    if plan.removed and not dry_run:
        calls = batches if correct_batch_norm and data is not None else []
        with recording(model) as state:
            state.reference(budget.quantity, lambda: dense)
            before = measure_statistics(model, calls)
            state.record(remove_blocks(model, plan.removed, optimizers=optimizers))
            move_statistics(model, before, measure_statistics(model, calls), {})
    return plan
