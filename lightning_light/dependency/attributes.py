"""Find numbers of modules that count channels, where the code that fixes a size reads it from there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_light.dependency.context import SizeAttribute, counts, integers_of
from lightning_light.dependency.groups import ChannelGroup, graph_of
from lightning_light.dependency.labels import varying
from lightning_light.dependency.recording import Call, Recording
from lightning_light.dependency.rehearsal import Break
from lightning_light.dependency.trials import Trials

__all__ = ["lower_attributes"]


def lower_attributes(trials: Trials, failing: Sequence[tuple[ChannelGroup, str]]) -> bool:
    """Let numbers of modules that equal a count of failing channels follow it, where that mends a break.

    In every pass each module in which something breaks has one further attribute lowered. It stays if fewer calls of
    the module break, so what is not read for a size keeps its value.

    Returns:
        Whether an attribute was found.
    """
    tracer, search = trials.tracer, _Search(trials, [group.name for group, _ in failing])
    known = len(tracer.size_attributes)
    breaks = search.breaks()
    while breaks:
        before = Counter(search.module_of(one) for one in breaks)
        tried = search.next_candidates(breaks)
        if not tried:
            break
        tracer.size_attributes += tried
        breaks = search.breaks()
        after = Counter(search.module_of(one) for one in breaks)
        idle = [one for one in tried if after[one.module] >= before[one.module]]
        if idle:
            tracer.size_attributes[:] = [one for one in tracer.size_attributes if one not in idle]
            breaks = search.breaks()
    return len(tracer.size_attributes) > known


class _Search:
    """Passes without half of the failing channels: the same positions of groups of one width."""

    def __init__(self, trials: Trials, failing: Sequence[str]) -> None:
        self._trials, self._failing = trials, set(failing)
        self._recording = Recording(trials.tracer.recorder)
        self._tried: set[tuple[str, str]] = set()

    def breaks(self) -> list[Break]:
        """Return what breaks with the attributes that are known now."""
        graph = graph_of(self._trials.model, self._trials.tracer)
        widths = {group.name: group.width for group in graph.groups if group.name in self._failing}
        kept = {name: torch.arange(width) >= width // 2 for name, width in widths.items()}
        return self._trials.breaks(graph, self._recording, kept) or []

    def module_of(self, one: Break) -> str:
        """Return the name of the module whose code breaks."""
        return self._recording.calls[one.position].module

    def next_candidates(self, breaks: Sequence[Break]) -> list[SizeAttribute]:
        """Return one attribute that was not tried yet for each module, with all channels that it counts."""
        chosen: dict[str, str] = {}
        found: dict[tuple[Any, ...], SizeAttribute] = {}
        for call in (self._recording.calls[one.position] for one in breaks):
            for attribute, labels in self._counted(call):
                key = (call.module, attribute)
                if key not in self._tried and chosen.setdefault(call.module, attribute) == attribute:
                    found[key + tuple(labels.tolist())] = SizeAttribute(*key, labels)
        self._tried |= set(chosen.items())
        return list(found.values())

    def _counted(self, call: Call) -> Iterator[tuple[str, Tensor]]:
        """Yield the integers of the calling module that count channels which the call reads or gives."""
        numbers = integers_of(self._trials.model.get_submodule(call.module))
        for tensor in (*call.outputs, *call.inputs):
            for label in tensor.labels:
                if len(varying(label)) == 1:
                    roots = self._trials.tracer.union.roots(label.reshape(-1))
                    for name, number in numbers.items():
                        if counts(number, roots):
                            yield name, roots[:number]
