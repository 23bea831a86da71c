"""Prune channels without a Trainer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_light.batch_norm import measure_statistics, move_statistics
from lightning_light.budgets import Budget
from lightning_light.criteria.data import evidence_for
from lightning_light.criteria.evidence import Criterion
from lightning_light.criteria.learned_gates import LearnedGates, learn_gates
from lightning_light.dependency import DependencyGraph, trace_dependencies
from lightning_light.example_input import ExampleInput, example_of_batch
from lightning_light.measure.latency_table import LatencyTable
from lightning_light.structured.costs import measure
from lightning_light.structured.options import ChannelPruningOptions, Widths, check_gates, check_goal
from lightning_light.structured.plan import Goal, Plan, check_run, gate_problem, plan_channels, widths_of
from lightning_light.structured.ranking import Ranking
from lightning_light.structured.sensitivity import Sensitivity
from lightning_light.surgery.attachment import has_state, record, recording, state_of
from lightning_light.surgery.edit import cut
from lightning_light.targets import Targets
from lightning_light.validation import OpenFraction, PositiveInt, validated

__all__ = ["prune_channels"]


@validated
def prune_channels(
    model: nn.Module,
    example_inputs: Any,
    budget: Budget | None = None,
    *,
    criterion: Criterion = ChannelPruningOptions.criterion,
    ranking: Ranking = ChannelPruningOptions.ranking,
    targets: Targets | str | list[str] | None = ChannelPruningOptions.targets,
    remaining: dict[str, OpenFraction] | None = ChannelPruningOptions.remaining,
    widths: Widths = ChannelPruningOptions.widths,
    heads: Literal["dim", "head"] = ChannelPruningOptions.heads,
    data: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    calibration_batches: PositiveInt = ChannelPruningOptions.calibration_batches,
    correct_batch_norm: bool = ChannelPruningOptions.correct_batch_norm,
    optimizers: Iterable[Optimizer] = (),
    graph: DependencyGraph | None = None,
    dry_run: bool = False,
) -> Plan:
    """Remove the least important channels of ``model`` in one cut, in place, until the budget is met.

    With ``data`` every criterion can be used, and the batch-norm statistics are corrected afterwards: moved by what
    the cut did to the statistics of the same batches.

    Args:
        model: any module; its Parameter objects stay, their data change.
        example_inputs: what ``model`` is called with: a tensor, a tuple of positional arguments or a dict of keyword
            arguments.
        budget: what the model is to reach; None where ``remaining`` alone limits the widths. A relative budget counts
            from the model before its first compression by this package.
        criterion: scores weights; the channels with the lowest scores are removed.
        ranking: `Global`, `Local` or `Isomorphic`: which channels are compared with each other; `Sensitivity`, which
            needs ``data``.
        targets: layers whose output channels may be removed: patterns or `Targets`.
        remaining: layer pattern -> fraction of the layer's channels that stays; such layers are not ranked.
        widths: bounds on the number of channels that layers keep.
        heads: what is removed from an attention layer: ``"dim"``, the same positions of every head, or ``"head"``,
            whole heads.
        data: batches; of a tuple or list the first item is the model's input, a mapping is its keyword arguments.
        loss: (output, batch) -> scalar, for criteria that need gradients.
        calibration_batches: how many batches of ``data`` are used; `LearnedGates` use as many as they have steps.
        correct_batch_norm: correct the batch-norm statistics, with ``data``.
        optimizers: whose state follows.
        graph: the dependency graph of ``model`` as it is, where it is known; otherwise it is traced.
        dry_run: only plan.

    Returns:
        What was removed, and why other layers were kept.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or the criterion needs ``data`` or ``loss``.
        BudgetError: the budget cannot be reached; the model is unchanged.
        TargetError: ``targets`` or ``remaining`` match no layer.
        TraceError: the model does not run on ``example_inputs``.
        UnsupportedError: a layer was changed by a later method, for instance quantized.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_light import MACs
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> plan = prune_channels(model, torch.zeros(2, 8), MACs(0.5))
        >>> model[0].out_features, plan.after / plan.before
        (16, 0.5)
    """
    check_goal("prune_channels", budget, remaining)
    options = ChannelPruningOptions(
        criterion=criterion, ranking=ranking, targets=targets, remaining=remaining, widths=widths, heads=heads
    )
    check_gates("prune_channels", options)
    example = ExampleInput.of(example_inputs).to(model)
    graph = graph or trace_dependencies(model, example.args, example.kwargs, heads=heads)
    dense, table = 0.0, LatencyTable.of(budget)
    if budget is not None:
        now = functools.partial(measure, model, budget, example, graph, table)
        dense = state_of(model).reference(budget.quantity, now) if has_state(model) else now()
    goal = Goal(budget, example, widths_of(graph), dense, table=table)
    check_run(model, graph, options, goal)
    batches = [] if data is None else list(islice(data, calibration_batches))
    if isinstance(ranking, Sensitivity):
        goal = replace(goal, calls=[example_of_batch(batch, model) for batch in batches[: ranking.batches]])
    if isinstance(criterion, LearnedGates) and data is not None:
        inputs = (example_of_batch(batch, model) for batch in _endless(batches, data))
        gathered = learn_gates(model, criterion, gate_problem(model, graph, options, goal), inputs)
    else:
        gathered = evidence_for(
            "prune_channels", model, criterion, batches or None, batches=len(batches) or 1, loss=loss
        )
    plan = plan_channels(model, graph, options, goal, gathered)
    if plan.removed and not dry_run:
        calls = [example_of_batch(batch, model) for batch in batches] if correct_batch_norm else []
        _carry_out(model, graph, plan, calls, optimizers)
        if budget is not None:
            state_of(model).reference(budget.quantity, lambda: dense)
    return plan


def _carry_out(
    model: nn.Module, graph: DependencyGraph, plan: Plan, calls: list[ExampleInput], optimizers: Iterable[Optimizer]
) -> None:
    """Cut ``model``, record the cut in its compression state, and correct its batch-norm statistics."""
    kept = graph.kept_positions(plan.kept)
    with recording(model):  # remembers the structure before the cut
        before = measure_statistics(model, calls)
        edit = cut(model, kept, attributes=graph.attributes(model, plan.kept), optimizers=optimizers)
        move_statistics(model, before, measure_statistics(model, calls), kept)
        record(model, (), edit.entry(), kept)


def _endless(first: list[Any], data: Iterable[Any]) -> Iterator[Any]:
    """The batches ``first``, then those of ``data``, again and again unless it is an iterator."""
    yield from first
    found = True
    while found:
        found = False
        for batch in data:
            found = True
            yield batch
