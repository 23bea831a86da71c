"""Try a graph out: what stands as a number in the user's ``forward`` shows only when channels are missing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_light.dependency.alignment import misaligned
from lightning_light.dependency.groups import ChannelGroup, DependencyGraph, graph_of
from lightning_light.dependency.trace import Tracer, trace
from lightning_light.errors import TraceError
from lightning_light.surgery.edit import trial

__all__ = ["trace_dependencies"]

Kept = Mapping[str, Tensor]
_LEAST = 2
"""Of so few channels one does not show, after the other has left, where it went."""


def trace_dependencies(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, *, heads: str = "dim"
) -> DependencyGraph:
    """Find every set of channels of ``model`` that hangs together, and try each one.

    One forward pass is traced. Then channels are taken out, for a trial, and the pass is traced again: it must give
    outputs of the same shape, and every channel must arrive where it arrived before. What breaks that (a size or a
    position is written down in the code: ``x[:, 4:8]``) is first tied to the channels that it may have to leave with,
    and protected where that does not help.

    Args:
        model: a module; afterwards it is exactly what it was.
        args: positional arguments of one call; two samples in the batch are enough.
        kwargs: keyword arguments of that call.
        heads: what leaves an attention: ``"dim"``, the same position of every head, or ``"head"``, whole heads.

    Raises:
        TraceError: the forward pass fails on the input given.
    """
    tracer = trace(model, args, kwargs, heads=heads)
    attempt = _Attempt(model, args, kwargs or {}, tracer)
    graph = graph_of(model, tracer)
    broken = attempt.broken(graph)
    if broken and _tie_to_width(tracer, broken):
        graph = graph_of(model, tracer)
        broken = attempt.broken(graph)
    if broken and _tie_parts(attempt, broken):
        graph = graph_of(model, tracer)
        broken = attempt.broken(graph)
    while broken:
        for group, error in broken:
            tracer.book.protect(group.roots, f"a size is fixed in the code that reads it ({error})")
        graph = graph_of(model, tracer)
        broken = attempt.broken(graph)
    return graph


class _Attempt:
    """The model, as it would be after a cut."""

    def __init__(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], tracer: Tracer) -> None:
        self.model, self.tracer = model, tracer
        self._args, self._kwargs = args, kwargs

    def broken(self, graph: DependencyGraph) -> list[tuple[ChannelGroup, str]]:
        """Groups that cannot lose channels, each with the reason. Few passes where all is well."""
        free = [group for group in graph.groups if group.reason is None and group.width > 1]
        picked = torch.cat([torch.empty(0).long(), *(self.tracer.book.roots(labels) for labels in self.tracer.apart)])
        few = [group for group in free if group.width <= _LEAST and torch.isin(group.roots, picked).any()]
        found = [(group, f"{group.width} channels that the code picks by their position") for group in few]
        groups = [group for group in free if not any(group is other for other in few)]
        while (error := self.failure(graph, groups)) is not None:
            culprit = self._culprit(graph, groups)
            alone = self.failure(graph, [culprit])
            found.append((culprit, alone or error))
            groups = [group for group in groups if group is not culprit]
        return found

    def failure(self, graph: DependencyGraph, groups: Sequence[ChannelGroup]) -> str | None:
        """Why the pass fails when ``groups`` lose channels; None where all is well."""
        errors = (self._error(graph, kept) for kept in _patterns(groups))
        return next((error for error in errors if error is not None), None)

    def _culprit(self, graph: DependencyGraph, groups: Sequence[ChannelGroup]) -> ChannelGroup:
        """The last of the shortest beginning of ``groups`` that fails, by bisection."""
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
        book, known = self.tracer.after(positions)
        with trial(self.model, positions, attributes, values=True):
            try:
                again = trace(self.model, self._args, self._kwargs, heads=self.tracer.heads, known=known, book=book)
            except TraceError as error:
                return str(error.__cause__).partition("\n")[0]
        last = [group.roots for group in graph.groups if group.name in kept and int(kept[group.name].sum()) == 1]
        lone = torch.cat(last) if last else torch.empty(0, dtype=torch.long)
        return misaligned(self.tracer, again, graph.gone(kept), lone)


def _patterns(groups: Sequence[ChannelGroup]) -> Iterator[Kept]:
    """Different channels, and different numbers of them: a number in the code fits one pattern, not all."""
    generator = torch.Generator().manual_seed(0)
    many, few = [g for g in groups if g.width > _LEAST], [g for g in groups if g.width <= _LEAST]
    for mine, share in [*itertools.product((many, many[::2], many[1::2]), (0.5, 0.0)), (few, 0.0)]:
        kept = {}
        for group in mine:
            most = max(1, min(group.width - 2, int(group.width * share)))
            count = int(torch.randint(1, most + 1, (1,), generator=generator))
            gone = torch.randperm(group.width, generator=generator)[:count] if share else torch.zeros(1).long()
            kept[group.name] = torch.ones(group.width, dtype=torch.bool).index_fill(0, gone, False)
        if kept:
            yield kept


def _tie_to_width(tracer: Tracer, broken: Sequence[tuple[ChannelGroup, str]]) -> bool:
    """``x.reshape(n, length, heads, width // heads)``: what is split inside is as wide as what comes in."""
    roots = torch.cat([group.roots for group, _ in broken])
    tied = False
    for split in tracer.splits:
        if split.width is None or split.parts.numel() % split.width.numel():
            continue
        if torch.isin(tracer.book.roots(split.parts), roots).any() or torch.isin(split.width, roots).any():
            tracer.book.merge(split.parts.reshape(-1, split.width.numel()), split.width)
            tied = True
    return tied


def _tie_parts(attempt: _Attempt, broken: Sequence[tuple[ChannelGroup, str]]) -> bool:
    """``a, b = x.chunk(2, dim=1)``: the same positions must leave every part, where that mends what is broken."""
    tracer, tied = attempt.tracer, False
    roots = torch.cat([group.roots for group, _ in broken])
    for parts in {tuple(tracer.book.roots(part).flatten().tolist()): part for part in tracer.parts}.values():
        if parts.shape[1] <= _LEAST or not torch.isin(tracer.book.roots(parts), roots).any():
            continue
        before = tracer.book
        tracer.book = before.copy()
        tracer.book.merge(parts, parts[:1])
        graph = graph_of(attempt.model, tracer)
        mine = tracer.book.roots(parts)
        free = [group for group in graph.groups if group.reason is None and group.width > 1]
        groups = [group for group in free if torch.isin(group.roots, mine).any()]
        if not groups or attempt.failure(graph, groups) is not None:
            tracer.book = before
        else:
            tied = True
    return tied
