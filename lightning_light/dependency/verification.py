"""Trace dependencies, and verify the groups by removing channels: sizes fixed in ``forward`` show only then."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_light.dependency.alignment import misalignment
from lightning_light.dependency.groups import ChannelGroup, DependencyGraph, graph_of
from lightning_light.dependency.trace import Tracer, trace
from lightning_light.errors import TraceError
from lightning_light.surgery.edit import trial
from lightning_light.validation import validated

__all__ = ["trace_dependencies"]

Kept = Mapping[str, Tensor]
_TOO_FEW = 2
"""With so few channels, the positions of the remaining one cannot be compared."""


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
    tracer = trace(model, args, kwargs, heads=heads)
    attempt = _Attempt(model, args, kwargs or {}, tracer)
    graph = graph_of(model, tracer)
    failing = attempt.failing(graph)
    if failing and _couple_with_width(tracer, failing):
        graph = graph_of(model, tracer)
        failing = attempt.failing(graph)
    if failing and _couple_equal_parts(attempt, failing):
        graph = graph_of(model, tracer)
        failing = attempt.failing(graph)
    while failing:
        for group, error in failing:
            tracer.union.protect(group.roots, f"is read by code with a fixed size ({error})")
        graph = graph_of(model, tracer)
        failing = attempt.failing(graph)
    return graph


class _Attempt:
    """Trace the model as it would be after a cut."""

    def __init__(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], tracer: Tracer) -> None:
        self.model, self.tracer = model, tracer
        self._args, self._kwargs = args, kwargs

    def failing(self, graph: DependencyGraph) -> list[tuple[ChannelGroup, str]]:
        """Return the groups that cannot lose channels, each with the reason; few passes where there are none."""
        free = [group for group in graph.groups if group.reason is None and group.width > 1]
        selected = torch.cat(
            [torch.empty(0).long(), *(self.tracer.union.roots(labels) for labels in self.tracer.selected)]
        )
        few = [group for group in free if group.width <= _TOO_FEW and torch.isin(group.roots, selected).any()]
        found = [(group, f"{group.width} channels that the code selects by position") for group in few]
        groups = [group for group in free if not any(group is other for other in few)]
        while (error := self.failure(graph, groups)) is not None:
            first = self._first_failing(graph, groups)
            alone = self.failure(graph, [first])
            found.append((first, alone or error))
            groups = [group for group in groups if group is not first]
        return found

    def failure(self, graph: DependencyGraph, groups: Sequence[ChannelGroup]) -> str | None:
        """Describe why the pass fails when ``groups`` lose channels; None where it does not."""
        errors = (self._error(graph, kept) for kept in _patterns(groups))
        return next((error for error in errors if error is not None), None)

    def _first_failing(self, graph: DependencyGraph, groups: Sequence[ChannelGroup]) -> ChannelGroup:
        """Find the group whose removal makes the pass fail, by bisection: the last of the shortest failing prefix."""
        low, high = 1, len(groups)
        while low < high:
            middle = (low + high) // 2
            if self.failure(graph, groups[:middle]) is None:
                low = middle + 1
            else:
                high = middle
        return groups[high - 1]

    def _error(self, graph: DependencyGraph, kept: Kept) -> str | None:
        positions, attributes = graph.kept_positions(kept), graph.attributes(self.model, kept)
        union, known = self.tracer.after(positions)
        with trial(self.model, positions, attributes, values=True):
            try:
                again = trace(self.model, self._args, self._kwargs, heads=self.tracer.heads, known=known, union=union)
            except TraceError as error:
                return str(error.__cause__).partition("\n")[0]
        last = [group.roots for group in graph.groups if group.name in kept and int(kept[group.name].sum()) == 1]
        single = torch.cat(last) if last else torch.empty(0, dtype=torch.long)
        return misalignment(self.tracer, again, graph.removed(kept), single)


def _patterns(groups: Sequence[ChannelGroup]) -> Iterator[Kept]:
    """Yield cuts of different channels and numbers of channels: a size fixed in the code fits only one of them."""
    generator = torch.Generator().manual_seed(0)
    many, few = [g for g in groups if g.width > _TOO_FEW], [g for g in groups if g.width <= _TOO_FEW]
    for chosen, fraction in [*itertools.product((many, many[::2], many[1::2]), (0.5, 0.0)), (few, 0.0)]:
        kept = {}
        for group in chosen:
            most = max(1, min(group.width - 2, int(group.width * fraction)))
            count = int(torch.randint(1, most + 1, (1,), generator=generator))
            removed = torch.randperm(group.width, generator=generator)[:count] if fraction else torch.zeros(1).long()
            kept[group.name] = torch.ones(group.width, dtype=torch.bool).index_fill(0, removed, False)
        if kept:
            yield kept


def _couple_with_width(tracer: Tracer, failing: Sequence[tuple[ChannelGroup, str]]) -> bool:
    """Couple what a module splits with its input where both have one width: ``x.reshape(n, heads, width // heads)``."""
    roots = torch.cat([group.roots for group, _ in failing])
    coupled = False
    for split in tracer.splits:
        if split.width is None or split.parts.numel() % split.width.numel():
            continue
        if torch.isin(tracer.union.roots(split.parts), roots).any() or torch.isin(split.width, roots).any():
            tracer.union.merge(split.parts.reshape(-1, split.width.numel()), split.width)
            coupled = True
    return coupled


def _couple_equal_parts(attempt: _Attempt, failing: Sequence[tuple[ChannelGroup, str]]) -> bool:
    """Couple the same position of all parts of ``a, b = x.chunk(2, dim=1)``, where that makes failing groups pass."""
    tracer, coupled = attempt.tracer, False
    roots = torch.cat([group.roots for group, _ in failing])
    for parts in {tuple(tracer.union.roots(part).flatten().tolist()): part for part in tracer.parts}.values():
        if parts.shape[1] <= _TOO_FEW or not torch.isin(tracer.union.roots(parts), roots).any():
            continue
        before = tracer.union
        tracer.union = before.copy()
        tracer.union.merge(parts, parts[:1])
        graph = graph_of(attempt.model, tracer)
        coupled_roots = tracer.union.roots(parts)
        free = [group for group in graph.groups if group.reason is None and group.width > 1]
        groups = [group for group in free if torch.isin(group.roots, coupled_roots).any()]
        if not groups or attempt.failure(graph, groups) is not None:
            tracer.union = before
        else:
            coupled = True
    return coupled
