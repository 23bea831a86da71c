"""Prune a network outside a Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_light.dependency import DependencyGraph, trace_dependencies
from lightning_light.example_input import ExampleInput
from lightning_light.structured.costs import quantity
from lightning_light.structured.plan import Plan, plan_channels
from lightning_light.structured.scores import Gathered
from lightning_light.structured.structured_pruning import StructuredPruning
from lightning_light.surgery.edit import cut

__all__ = ["prune_channels"]


def prune_channels(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    pruning: StructuredPruning,
    optimizers: Iterable[Optimizer] = (),
    graph: DependencyGraph | None = None,
) -> Plan:
    """Remove channels of ``model`` in one shot, in place, as the callback ``pruning`` would at its last cut.

    Args:
        model: any module; Parameter objects survive.
        args: positional arguments of one call.
        kwargs: keyword arguments of that call.
        pruning: says what to reach and how to choose; its schedule does not count. With ``dry_run`` nothing is removed.
        optimizers: whose state is to follow.
        graph: of ``model`` as it stands, where it is known; else it is traced.

    Returns:
        What has left, and why the rest stayed.

    Raises:
        ValueError: the criterion needs gradients or activations, which only training gathers.
        BudgetError: the budget cannot be reached.
        TargetError: the targets name nothing.
        TraceError: the network does not run on the example input.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_light import MACs
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> plan = prune_channels(model, (torch.zeros(2, 8),), pruning=StructuredPruning(MACs(0.5)))
        >>> model[0].out_features, plan.after / plan.before
        (16, 0.5)
    """
    if pruning.criterion.needs - {"generator"}:
        raise ValueError(
            f"`prune_channels(pruning={pruning!r})`: expected a criterion that reads weights alone, found one that "
            f"needs {sorted(pruning.criterion.needs)}. Use the callback in a Trainer, or `criterion=Magnitude()`."
        )
    example = ExampleInput(args, dict(kwargs or {}))
    graph = graph or trace_dependencies(model, args, kwargs, heads=pruning.heads)
    dense = 0.0 if pruning.budget is None else quantity(model, pruning.budget, example, graph.groups)
    plan = plan_channels(
        model,
        graph,
        pruning.options(),
        budget=pruning.budget,
        limit=0.0 if pruning.budget is None else pruning.budget.goal(dense),
        share=1.0,
        original={group.name: group.width for group in graph.groups},
        example=example,
        gathered=Gathered(),
        generator=torch.Generator().manual_seed(0),
    )
    if plan.removed and not pruning.dry_run:
        kept = graph.kept_positions(plan.kept)
        cut(model, kept, attributes=graph.attributes(model, plan.kept), optimizers=optimizers)
    return plan
