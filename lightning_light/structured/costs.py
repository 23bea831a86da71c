"""Compute what a model would cost after a cut: estimated during the search, counted for the result."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_light.budgets import Budget, MACs
from lightning_light.dependency import ChannelGroup, DependencyGraph
from lightning_light.example_input import ExampleInput
from lightning_light.measure.latency_table import LatencyTable
from lightning_light.surgery.edit import trial

__all__ = ["Estimator", "FileEstimator", "measure", "smallest"]


def measure(
    model: nn.Module, budget: Budget, example: ExampleInput, graph: DependencyGraph, table: LatencyTable | None = None
) -> float:
    """Measure the quantity of ``budget``; one that counts channels needs no trace besides ``graph``."""
    if table is not None:
        return table.correct_by(model, example)
    if budget.channel_cost is not None:
        return budget.channel_cost * sum(group.width for group in graph.groups if group.reason is None)
    return budget.measure(model, example)


@dataclass(eq=False)
class Estimator:
    """Compute the cost of a model for any widths of its groups, from the shapes of its tensors.

    Exact where layers with weights do all the work: their cost is proportional to the elements of the weight. Products
    without weights (attention scores) are taken as constant; `exact` counts them.

    Attributes:
        now: the cost of the model as it is.
        is_noisy: whether the quantity is measured by running the model, so that two measurements differ.
    """

    model: nn.Module
    graph: DependencyGraph
    groups: Sequence[ChannelGroup]
    budget: Budget
    example: ExampleInput

    def __post_init__(self) -> None:
        self._widths = torch.tensor([group.width for group in self.groups])
        self._dims = _shrinking_dims(self.graph, self.groups)
        self.is_noisy = self.budget.runs_model
        self.now = self._measure()

    def _measure(self) -> float:
        return measure(self.model, self.budget, self.example, self.graph)

    def __call__(self, widths: Tensor) -> float:
        """Estimate the cost when group ``i`` keeps ``widths[i]`` channels."""
        return float(self.interpolate(widths))

    def interpolate(self, widths: Tensor) -> Tensor:
        """Estimate the cost for widths that are not necessarily integers; differentiable, a scalar of type double."""
        removed = self._widths - widths.double()
        if self.budget.channel_cost is not None:
            return self.now - self.budget.channel_cost * removed.sum()
        costs, slopes = self._shares
        return self.now - costs @ (1.0 - (1.0 - slopes @ removed).prod(dim=0))

    @functools.cached_property
    def _shares(self) -> tuple[Tensor, Tensor]:
        """Cost of each tensor; fraction of each of its dimensions, per removed channel of each group."""
        known = self._tensor_costs()
        costs = torch.tensor([known.get(tensor, 0.0) for tensor in self._dims], dtype=torch.double)
        depth = max((len(dims) for dims in self._dims.values()), default=0)
        slopes = torch.zeros(depth, len(self._dims), len(self.groups), dtype=torch.double)
        for row, dims in enumerate(self._dims.values()):
            for place, (size, numbers, positions) in enumerate(dims):
                slopes[place, row].index_add_(0, numbers, positions.double() / size)
        return costs, slopes

    def _tensor_costs(self) -> dict[str, float]:
        return self.budget.tensor_costs(self.model, self.example)

    def exact(self, kept: Mapping[str, Tensor]) -> float:
        """Count or measure the cost of the model in the shape that it would have."""
        if self.budget.channel_cost is not None:
            return self(self._widths_of(kept))
        with self._cut(kept, values=self.budget.runs_model):
            return self.budget.measure(self.model, self.example)

    def least(self, kept: Mapping[str, Tensor]) -> float:
        """Count or measure the cost with every group at its smallest width."""
        return self.exact(kept)

    def _widths_of(self, kept: Mapping[str, Tensor]) -> Tensor:
        return torch.tensor([int(kept[group.name].sum()) for group in self.groups])

    def _cut(self, kept: Mapping[str, Tensor], *, values: bool) -> AbstractContextManager[object]:
        positions, attributes = self.graph.kept_positions(kept), self.graph.attributes(self.model, kept)
        return trial(self.model, positions, attributes, values=values)


@dataclass(eq=False)
class FileEstimator(Estimator):
    """Estimate the latency of the model's file for any widths, from a table of its operators in the runtime.

    Args:
        model: see `Estimator`.
        graph: see `Estimator`.
        groups: see `Estimator`.
        budget: see `Estimator`.
        example: see `Estimator`.
        table: corrected by the file of the model, if it is not corrected yet.
    """

    table: LatencyTable
    _known: dict[tuple[int, ...], float] = field(default_factory=dict, init=False)

    @override
    def __call__(self, widths: Tensor) -> float:
        key = tuple(widths.tolist())
        if key not in self._known:
            kept = {g.name: torch.arange(g.width) < width for g, width in zip(self.groups, key, strict=True)}
            with self._cut(kept, values=False):
                self._known[key] = self.table.estimate(self.model, self.example)
        return self._known[key]

    @override
    def exact(self, kept: Mapping[str, Tensor]) -> float:
        return self(self._widths_of(kept))

    @override
    def least(self, kept: Mapping[str, Tensor]) -> float:
        """Measure the file with every group at its smallest width; the first one corrects the estimates."""
        with self._cut(kept, values=True):
            if self.table.is_corrected:
                return self.table.file(self.model, self.example)
            seconds = self.table.correct_by(self.model, self.example)
        self.now = self.table.estimate(self.model, self.example)
        return seconds

    def file(self, kept: Mapping[str, Tensor]) -> float:
        """Measure the file of the model in the shape that it would have."""
        with self._cut(kept, values=True):
            return self.table.file(self.model, self.example)

    @override
    def _measure(self) -> float:
        if not self.table.used["estimated"]:
            self.table.correct_by(self.model, self.example)
        return self.table.estimate(self.model, self.example)

    @override
    def _tensor_costs(self) -> dict[str, float]:
        costs = MACs(1.0).tensor_costs(self.model, self.example)
        scale = self.now / max(sum(costs.values()), 1.0)
        return {name: cost * scale for name, cost in costs.items()}


def _shrinking_dims(
    graph: DependencyGraph, groups: Sequence[ChannelGroup]
) -> dict[str, list[tuple[int, Tensor, Tensor]]]:
    """Tensor -> for each dimension that may shrink: its size, the groups in it, positions per channel of each."""
    found: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for number, group in enumerate(groups):
        for member in group.members:
            found.setdefault((member.tensor, member.dim), []).append((number, member.index.shape[1]))
    dims: dict[str, list[tuple[int, Tensor, Tensor]]] = {}
    for (tensor, dim), held in found.items():
        numbers, positions = (torch.tensor(column) for column in zip(*held, strict=True))
        dims.setdefault(tensor, []).append((graph.shapes[tensor][dim], numbers, positions))
    return dims


def smallest(test: Callable[[int], bool], low: int, high: int) -> int:
    """Find the smallest number in ``[low, high]`` for which ``test`` holds, by bisection; it holds at ``high``."""
    while low < high:
        middle = (low + high) // 2
        if test(middle):
            high = middle
        else:
            low = middle + 1
    return high
