"""Find the groups that cannot lose channels: run the model without some, and attribute what breaks to groups."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_light.dependency.alignment import misalignment
from lightning_light.dependency.groups import ChannelGroup, DependencyGraph
from lightning_light.dependency.placeholders import ValueNeededError
from lightning_light.dependency.recording import Recording
from lightning_light.dependency.rehearsal import Break, OtherPathError, Rehearsal
from lightning_light.dependency.trace import Tracer, trace
from lightning_light.errors import TraceError
from lightning_light.host.classes import loaded_hosts
from lightning_light.surgery.edit import trial

__all__ = ["TOO_FEW", "Trials"]

Kept = Mapping[str, Tensor]
TOO_FEW = 2
"""With so few channels, the positions of the remaining one cannot be compared."""
_MOST_SUSPECTS = 8
"""So many groups that take part in one break are tried one by one; more are bisected."""
_SILENT_SECONDS = 2.0


class Trials:
    """Passes of ``model`` without some of the channels that ``tracer`` has followed."""

    def __init__(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], tracer: Tracer) -> None:
        self.model, self.tracer = model, tracer
        self._args, self._kwargs = args, kwargs
        self._skip_products = tracer.skip_products
        self._progress = _Progress(type(model).__name__)

    def failing(self, graph: DependencyGraph) -> list[tuple[ChannelGroup, str]]:
        """Return the groups of ``graph`` that cannot lose channels, each with the reason."""
        free = [group for group in graph.groups if group.reason is None and group.width > 1]
        roots = self.tracer.union.roots
        selected = torch.cat([torch.empty(0).long(), *(roots(labels) for labels in self.tracer.selected)])
        few = [group for group in free if group.width <= TOO_FEW and torch.isin(group.roots, selected).any()]
        found = [(group, f"{group.width} channels that the code selects by position") for group in few]
        names = {group.name for group in few}
        return found + self.failing_among(graph, [group for group in free if group.name not in names])

    def failing_among(self, graph: DependencyGraph, groups: Sequence[ChannelGroup]) -> list[tuple[ChannelGroup, str]]:
        """Return those of ``groups`` that cannot lose channels: one pass per pattern, and a few for each failure."""
        search = _Search(self, graph, groups)
        failed: dict[str, str] = {}
        for pattern in _patterns(groups):
            kept = {name: mask for name, mask in pattern.items() if name not in failed}
            while kept and (found := search.culprits(kept)):
                failed.update(found)
                kept = {name: mask for name, mask in kept.items() if name not in failed}
        return [(group, failed[group.name]) for group in groups if group.name in failed]

    def breaks(self, graph: DependencyGraph, recording: Recording, kept: Kept) -> list[Break] | None:
        """Return what breaks without the channels that ``kept`` removes; None if the pass fails at no known call."""
        found, complete = self._rehearsed(graph, recording, kept)
        failures = [one for one in found if one.kind != "path"]
        if failures or (complete and not found):
            return failures
        return [] if self.error(graph, kept) is None else found or None

    def _rehearsed(self, graph: DependencyGraph, recording: Recording, kept: Kept) -> tuple[list[Break], bool]:
        """Return the breaks of a rehearsal, and whether it reached the end."""
        single = any(int(mask.sum()) == 1 for mask in kept.values())
        removed, attributes = graph.removed(kept), graph.attributes(self.model, kept)
        for skip in (True, False) if self._skip_products else (False,):
            self._progress.count()
            rehearsal = Rehearsal(recording, removed, skip_products=skip, compare_order=not single)
            positions = rehearsal.expected.kept_positions()
            try:
                with trial(self.model, positions, attributes, values=not skip):
                    rehearsal.run(self.model, self._args, self._kwargs, positions)
                return rehearsal.breaks, True
            except ValueNeededError:
                self._skip_products = False
            except (OtherPathError, TraceError):
                break
        return rehearsal.breaks, False

    def error(self, graph: DependencyGraph, kept: Kept) -> str | None:
        """Trace the model without the channels that ``kept`` removes, and describe the first failure."""
        self._progress.count()
        union, known = self.tracer.after(graph.kept_positions(kept))
        with trial(self.model, graph.kept_positions(kept), graph.attributes(self.model, kept), values=True):
            try:
                again = trace(self.model, self._args, self._kwargs, heads=self.tracer.heads, known=known, union=union)
            except TraceError as error:
                return str(error.__cause__).partition("\n")[0]
        last = [group.roots for group in graph.groups if group.name in kept and int(kept[group.name].sum()) == 1]
        single = torch.cat(last) if last else torch.empty(0, dtype=torch.long)
        return misalignment(self.tracer, again, graph.removed(kept), single)


class _Search:
    """Attribute the breaks of passes to the groups of one graph."""

    def __init__(self, trials: Trials, graph: DependencyGraph, groups: Sequence[ChannelGroup]) -> None:
        self._trials, self._graph = trials, graph
        self._recording = Recording(trials.tracer.recorder)
        self._names = [group.name for group in groups]
        self._owner = torch.full((trials.tracer.union.parent.numel(),), -1)
        for number, group in enumerate(groups):
            self._owner[group.roots] = number

    def culprits(self, kept: Kept) -> dict[str, str]:
        """Return group name -> error: every group that alone explains a break, or one that takes part in it."""
        breaks = self._trials.breaks(self._graph, self._recording, kept)
        if breaks is None:
            name = self._bisected(kept)
            error = self._trials.error(self._graph, {name: kept[name]})
            return {name: error or "the forward pass fails"}
        suspects = [(one, self._groups_of(one, kept)) for one in breaks]
        found = {names[0]: x.error for x, names in reversed(suspects) if len(names) == 1 and x.kind == "call"}
        if found or not breaks:
            return found  # without these the other breaks may not occur
        several = [(one, names) for one, names in suspects if 0 < len(names) <= _MOST_SUSPECTS]
        if found := self._each_alone(several, kept):
            return found
        together = {names[-1]: one.error for one, names in several if one.kind == "call"}
        return together or {self._bisected(kept): breaks[0].error}

    def _groups_of(self, one: Break, kept: Kept) -> list[str]:
        """Name the groups that take part in a break, in the order of the graph.

        Where none has channels in the call, a size attribute may be what changed: of the calling module, or around it.
        """
        if found := self._owners(one.labels, kept):
            return found
        module = self._recording.calls[one.position].module
        attributes = [
            x for x in self._graph.size_attributes if f"{module}.".startswith(f"{x.module}." if x.module else "")
        ]
        return self._owners(torch.cat([one.labels, *(attribute.labels for attribute in attributes)]), kept)

    def _owners(self, labels: Tensor, kept: Kept) -> list[str]:
        numbers = torch.unique(self._owner[labels]).tolist()
        return [self._names[number] for number in numbers if number >= 0 and self._names[number] in kept]

    def _each_alone(self, several: Sequence[tuple[Break, list[str]]], kept: Kept) -> dict[str, str]:
        """Try the groups of every break one after the other, those of different breaks in the same pass."""
        for turn in range(max((len(names) for _, names in several), default=0)):
            chosen = {names[turn]: kept[names[turn]] for _, names in several if turn < len(names)}
            breaks = self._trials.breaks(self._graph, self._recording, chosen) or []
            suspects = [(one, self._groups_of(one, chosen)) for one in breaks]
            found = {names[0]: one.error for one, names in reversed(suspects) if len(names) == 1}
            if found:
                return found
        return {}

    def _bisected(self, kept: Kept) -> str:
        """Return the last group of the shortest failing prefix of ``kept``."""
        names = [name for name in self._names if name in kept]
        low, high = 1, len(names)
        while low < high:
            middle = (low + high) // 2
            prefix = {name: kept[name] for name in names[:middle]}
            if self._trials.breaks(self._graph, self._recording, prefix) == []:
                low = middle + 1
            else:
                high = middle
        return names[high - 1]


class _Progress:
    """Log once that tracing takes long."""

    def __init__(self, model: str) -> None:
        self._model, self._passes = model, 0
        self._started: float | None = time.monotonic()

    def count(self) -> None:
        self._passes += 1
        if self._started is not None and time.monotonic() - self._started > _SILENT_SECONDS:
            self._started = None
            host = next(iter(loaded_hosts()), "")
            logging.getLogger(f"{host}.lightning_light".lstrip(".")).info(
                f"Tracing the dependencies of `{self._model}`: {self._passes} trial passes so far, more to come."
            )


def _patterns(groups: Sequence[ChannelGroup]) -> Iterator[dict[str, Tensor]]:
    """Yield cuts of different channels and numbers of channels: a size fixed in the code fits only one of them."""
    generator = torch.Generator().manual_seed(0)
    many, few = [g for g in groups if g.width > TOO_FEW], [g for g in groups if g.width <= TOO_FEW]
    for chosen, fraction in [*itertools.product((many, many[::2], many[1::2]), (0.5, 0.0)), (few, 0.0)]:
        kept = {}
        for group in chosen:
            most = max(1, min(group.width - 2, int(group.width * fraction)))
            count = int(torch.randint(1, most + 1, (1,), generator=generator))
            removed = torch.randperm(group.width, generator=generator)[:count] if fraction else torch.zeros(1).long()
            kept[group.name] = torch.ones(group.width, dtype=torch.bool).index_fill(0, removed, False)
        if kept:
            yield kept
