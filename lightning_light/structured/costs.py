"""What a model would cost after a cut: estimated for the search, counted for the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_light.budgets import Budget
from lightning_light.dependency import ChannelGroup, DependencyGraph
from lightning_light.example_input import ExampleInput
from lightning_light.measure.cost import count_cost
from lightning_light.measure.isolation import isolated
from lightning_light.measure.latency import measure_latency
from lightning_light.measure.size import tensor_bytes
from lightning_light.surgery.edit import trial

__all__ = ["Estimator", "quantity", "smallest"]


def quantity(model: nn.Module, budget: Budget, example: ExampleInput, groups: Sequence[ChannelGroup]) -> float:
    """What ``budget`` counts, of ``model`` as it stands: MACs (of one sample), params, channels, bytes or seconds.

    Seconds are the median of 20 forward passes of the example on the model's own device, after warm-up.
    """
    if budget.quantity == "macs":
        return count_cost(model, example.args, example.kwargs).macs / example.samples
    if budget.quantity == "params":
        return float(sum(parameter.numel() for parameter in model.parameters()))
    if budget.quantity == "bytes":
        return float(tensor_bytes(model))
    if budget.quantity == "seconds":
        with isolated(model):
            return measure_latency(lambda: model(*example.args, **example.kwargs), warmup=3, runs=20).median
    return float(sum(group.width for group in groups if group.reason is None))


class Estimator:
    """Cost of the model for any widths of its groups, by arithmetic on shapes.

    Exact where all work is done by layers with weights: a layer's MACs are proportional to the elements of its weight.
    Products without weights (attention scores) are taken as constant; `exact` counts them.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: DependencyGraph,
        groups: Sequence[ChannelGroup],
        budget: Budget,
        example: ExampleInput,
    ) -> None:
        self._model, self._graph, self.groups = model, graph, list(groups)
        self._budget, self._example = budget, example
        self._dims = _shrinking_dims(graph, self.groups)
        self.now = quantity(model, budget, example, graph.groups)
        self._weights = self._cost_of_tensors()

    def __call__(self, widths: Tensor) -> float:
        """Estimated quantity when group ``i`` keeps ``widths[i]`` channels."""
        if self._budget.quantity == "channels":
            return self.now - float(sum(g.width for g in self.groups) - int(widths.sum()))
        lost = torch.tensor([group.width for group in self.groups]) - widths
        total = self.now
        for tensor, weight in self._weights.items():
            share = 1.0
            for size, numbers, positions in self._dims[tensor]:
                share *= 1.0 - float((lost[numbers] * positions).sum()) / size
            total -= weight * (1.0 - share)
        return total

    def exact(self, kept: Mapping[str, Tensor]) -> float:
        """The quantity, counted or measured on the model in the shape it would have."""
        if self._budget.quantity == "channels":
            return self(torch.tensor([int(kept[group.name].sum()) for group in self.groups]))
        positions = self._graph.kept_positions(kept)
        attributes = self._graph.attributes(self._model, kept)
        with trial(self._model, positions, attributes, values=self._budget.quantity == "seconds"):
            return quantity(self._model, self._budget, self._example, ())

    def _cost_of_tensors(self) -> dict[str, float]:
        """What of the quantity each tensor that may shrink stands for."""
        tensors = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        mine = {name: tensors[name] for name in self._dims}
        if self._budget.quantity == "params":
            return {name: float(t.numel()) for name, t in mine.items() if isinstance(t, nn.Parameter)}
        if self._budget.quantity == "bytes":
            return {name: float(t.numel() * t.element_size()) for name, t in mine.items()}
        if self._budget.quantity == "channels":
            return {}
        macs = count_cost(self._model, self._example.args, self._example.kwargs).macs_by_module
        scale = self.now / max(sum(macs.values()), 1)
        return _shared_out(macs, tensors, set(mine), scale)


def _shared_out(
    macs: Mapping[str, int], tensors: Mapping[str, Tensor], mine: set[str], scale: float
) -> dict[str, float]:
    """A module's work, shared out among its weights by their elements."""
    owners: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.dim() > 1:
            owners.setdefault(_worker(name, macs), []).append(name)
    result = {}
    for module, names in owners.items():
        elements = sum(tensors[name].numel() for name in names)
        for name in mine.intersection(names):
            result[name] = macs.get(module, 0) * scale * tensors[name].numel() / elements
    return result


def _worker(name: str, macs: Mapping[str, int]) -> str:
    """The module that does the work of a tensor: its owner, or the one above (a parametrization, a projection)."""
    path = name.rpartition(".")[0]
    while path not in macs and "." in path:
        path = path.rpartition(".")[0]
    return path


def _shrinking_dims(
    graph: DependencyGraph, groups: Sequence[ChannelGroup]
) -> dict[str, list[tuple[int, Tensor, Tensor]]]:
    """Tensor -> for each dimension that may shrink: its size, the groups it holds, positions a channel of each."""
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
    """The smallest number in ``[low, high]`` for which ``test`` holds, by bisection; it holds at ``high``."""
    while low < high:
        middle = (low + high) // 2
        if test(middle):
            high = middle
        else:
            low = middle + 1
    return high
