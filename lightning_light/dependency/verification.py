"""Trace dependencies, and verify the groups by removing channels: sizes fixed in ``forward`` show only then."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_light.dependency.groups import ChannelGroup, DependencyGraph, graph_of
from lightning_light.dependency.trace import Tracer, trace
from lightning_light.dependency.trials import TOO_FEW, Trials
from lightning_light.validation import validated

__all__ = ["trace_dependencies", "trace_verified"]


@validated
def trace_dependencies(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, *, heads: str = "dim"
) -> DependencyGraph:
    """Find the dependency groups of ``model``, and verify each one.

    One forward pass is traced. Then channels are removed for a trial, and the pass is traced again: it must give
    outputs of the same shape, and every operation must read the channels that it read before. A group that fails,
    because the code fixes a size or a position (``x[:, 4:8]``), is first coupled with the channels that it may have to
    be removed with, and protected where that does not help.

    Args:
        model: a module; it is left exactly as it was.
        args: positional arguments of one call; two samples in the batch are enough.
        kwargs: keyword arguments of that call.
        heads: what is removed from an attention: ``"dim"``, the same position of every head, or ``"head"``, whole
            heads.

    Raises:
        TraceError: the forward pass fails on the input given.
    """
    return trace_verified(model, args, kwargs or {}, heads=heads)


def trace_verified(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    heads: str,
    protect: Callable[[Tracer, DependencyGraph], None] | None = None,
) -> DependencyGraph:
    """Trace and verify the dependency groups of one call; ``protect`` protects more than the trace has."""
    tracer = trace(model, args, kwargs, heads=heads)
    trials = Trials(model, args, kwargs, tracer)
    graph = graph_of(model, tracer)
    if protect is not None:
        protect(tracer, graph)
        graph = graph_of(model, tracer)
    failing = trials.failing(graph)
    for couple in (_couple_with_width, _couple_equal_parts):
        if failing and couple(trials, failing):
            graph = graph_of(model, tracer)
            failing = trials.failing(graph)
    for group, error in failing:  # the others passed every trial without these
        tracer.union.protect(group.roots, f"is read by code with a fixed size ({error})")
    return graph_of(model, tracer) if failing else graph


def _couple_with_width(trials: Trials, failing: Sequence[tuple[ChannelGroup, str]]) -> bool:
    """Couple what a module splits with its input where both have one width: ``x.reshape(n, heads, width // heads)``."""
    tracer = trials.tracer
    roots = torch.cat([group.roots for group, _ in failing])
    coupled = False
    for split in tracer.splits:
        if split.width is None or split.parts.numel() % split.width.numel():
            continue
        if torch.isin(tracer.union.roots(split.parts), roots).any() or torch.isin(split.width, roots).any():
            tracer.union.merge(split.parts.reshape(-1, split.width.numel()), split.width)
            coupled = True
    return coupled


def _couple_equal_parts(trials: Trials, failing: Sequence[tuple[ChannelGroup, str]]) -> bool:
    """Couple the same position of all parts of ``a, b = x.chunk(2, dim=1)``, where that makes failing groups pass.

    The same for channels that one size attribute counts, such as the positions of query and value heads.

    All candidates are coupled at once; those with groups that still fail are dropped, and the others tried again.
    """
    tracer, before = trials.tracer, trials.tracer.union
    roots = torch.cat([group.roots for group, _ in failing])
    candidates = [*tracer.parts, *_counted_together(tracer)]
    distinct = {tuple(before.roots(part).flatten().tolist()): part for part in candidates}.values()
    parts = [x for x in distinct if x.shape[1] > TOO_FEW and torch.isin(before.roots(x), roots).any()]
    while parts:
        tracer.union = before.copy()
        for part in parts:
            tracer.union.merge(part, part[:1])
        passing = _passing(trials, parts)
        if len(passing) == len(parts):
            return True
        parts = passing
    tracer.union = before
    return False


def _counted_together(tracer: Tracer) -> list[Tensor]:
    """Return the different channels that one size attribute counts, shape ``(kinds, size)``."""
    counted: dict[tuple[str, str], dict[tuple[int, ...], Tensor]] = {}
    for attribute in tracer.size_attributes:
        roots = tracer.union.roots(attribute.labels)
        counted.setdefault((attribute.module, attribute.attribute), {})[tuple(roots.tolist())] = roots
    kinds = [list(found.values()) for found in counted.values() if len(found) > 1]
    return [torch.stack(found) for found in kinds if len({labels.numel() for labels in found}) == 1]


def _passing(trials: Trials, parts: Sequence[Tensor]) -> list[Tensor]:
    """Return the coupled ``parts`` that have free groups, all of which pass."""
    graph, union = graph_of(trials.model, trials.tracer), trials.tracer.union
    coupled = torch.cat([union.roots(part).reshape(-1) for part in parts])
    free = [group for group in graph.groups if group.reason is None and group.width > 1]
    groups = [group for group in free if torch.isin(group.roots, coupled).any()]
    none = torch.empty(0, dtype=torch.long)
    failed = torch.cat([none, *(group.roots for group, _ in trials.failing_among(graph, groups))])
    able = torch.cat([none, *(group.roots for group in groups)])
    labels = [union.roots(part) for part in parts]
    passes = [bool(torch.isin(x, able).any()) and not bool(torch.isin(x, failed).any()) for x in labels]
    return [part for part, passed in zip(parts, passes, strict=True) if passed]
