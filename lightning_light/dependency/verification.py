"""Trace dependencies, and verify the groups by removing channels: sizes fixed in ``forward`` show only then."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_light.dependency.attributes import lower_attributes
from lightning_light.dependency.groups import ChannelGroup, DependencyGraph, graph_of
from lightning_light.dependency.trace import Tracer, trace
from lightning_light.dependency.trials import TOO_FEW, Trials
from lightning_light.validation import validated

__all__ = ["trace_dependencies", "trace_verified"]


_Failing: TypeAlias = "Sequence[tuple[ChannelGroup, str]]"
_Mend: TypeAlias = "Callable[[Trials, _Failing], bool]"


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
    finders = (_counted_together, _widths, _equal_parts, _both)
    mends: list[_Mend] = [partial(_couple, found_by=candidates) for candidates in finders]
    for mend in (lower_attributes, *mends):
        if failing and mend(trials, failing):
            graph = graph_of(model, tracer)
            failing = trials.failing(graph)
    for group, error in failing:  # the others passed every trial without these
        tracer.union.protect(group.roots, f"is read by code with a fixed size ({error})")
    return graph_of(model, tracer) if failing else graph


def _couple(trials: Trials, failing: _Failing, found_by: Callable[[Tracer], list[Tensor]]) -> bool:
    """Couple the rows of candidates, position by position, where that makes their failing groups pass.

    All candidates are coupled at once; those with groups that still fail are dropped, and the others tried again.
    """
    tracer, before = trials.tracer, trials.tracer.union
    roots = torch.cat([group.roots for group, _ in failing])
    distinct = {tuple(before.roots(part).flatten().tolist()): part for part in found_by(tracer)}.values()
    parts = [part for part in distinct if torch.isin(before.roots(part), roots).any()]
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


def _widths(tracer: Tracer) -> list[Tensor]:
    """Return what a module splits, and its input of the same width: ``x.reshape(n, heads, width // heads)``."""
    found = []
    for split in tracer.splits:
        if split.width is not None and split.parts.numel() % split.width.numel() == 0:
            width = split.width.reshape(1, -1)
            found.append(torch.cat([width, split.parts.reshape(-1, width.numel())]))
    return found


def _equal_parts(tracer: Tracer) -> list[Tensor]:
    """Return the parts of ``a, b = x.chunk(2, dim=1)``, and different channels that one size attribute counts."""
    return [*(part for part in tracer.parts if part.shape[1] > TOO_FEW), *_counted_together(tracer)]


def _both(tracer: Tracer) -> list[Tensor]:
    return _widths(tracer) + _equal_parts(tracer)


def _counted_together(tracer: Tracer) -> list[Tensor]:
    """Return the different channels that one size attribute counts, shape ``(kinds, size)``."""
    counted: dict[tuple[str, str], dict[tuple[int, ...], Tensor]] = {}
    for attribute in tracer.size_attributes:
        roots = tracer.union.roots(attribute.labels)
        counted.setdefault((attribute.module, attribute.attribute), {})[tuple(roots.tolist())] = roots
    kinds = [list(found.values()) for found in counted.values() if len(found) > 1]
    equal = [found for found in kinds if len({labels.numel() for labels in found}) == 1]
    return [torch.stack(found) for found in equal if found[0].numel() > TOO_FEW]


def _passing(trials: Trials, parts: Sequence[Tensor]) -> list[Tensor]:
    """Return the coupled ``parts`` that have free groups of more than a few channels, all of which pass."""
    graph, union = graph_of(trials.model, trials.tracer), trials.tracer.union
    coupled = torch.cat([union.roots(part).reshape(-1) for part in parts])
    free = [group for group in graph.groups if group.reason is None and group.width > TOO_FEW]
    groups = [group for group in free if torch.isin(group.roots, coupled).any()]
    none = torch.empty(0, dtype=torch.long)
    failed = torch.cat([none, *(group.roots for group, _ in trials.failing_among(graph, groups))])
    able = torch.cat([none, *(group.roots for group in groups)])
    labels = [union.roots(part) for part in parts]
    passes = [bool(torch.isin(x, able).any()) and not bool(torch.isin(x, failed).any()) for x in labels]
    return [part for part, passed in zip(parts, passes, strict=True) if passed]
