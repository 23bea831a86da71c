"""Measure what layers cost, how long they take, and how much the output changes when one is factorized."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_light.budgets import Budget, Latency, MACs, synchronized
from lightning_light.copies import copy_network
from lightning_light.example_input import ExampleInput
from lightning_light.isolation import isolated
from lightning_light.lowrank.build import build_factors, replay_factors
from lightning_light.lowrank.factors import compose
from lightning_light.lowrank.layers import FactorizableLayer
from lightning_light.lowrank.plan import Goal
from lightning_light.lowrank.ranks import RankRule
from lightning_light.lowrank.spectra import Ranks, Spectrum
from lightning_light.lowrank.splitting import split_weights
from lightning_light.measure.latency import measure_latency
from lightning_light.measure.latency_table import LatencyTable
from lightning_light.nested import tensors_in
from lightning_light.surgery.attachment import state_of
from lightning_light.surgery.replace import put_module

__all__ = ["FileTimer", "LayerTimer", "OutputProbe", "goal_of", "price_of", "quantity_of"]

_WARMUP = 3
_PRICED = 8


def quantity_of(
    budget: Budget | RankRule, model: nn.Module, example: ExampleInput, table: LatencyTable | None = None
) -> float:
    """Measure the budget's quantity of ``model``; under a rule its multiply-accumulates."""
    if table is not None:
        return table.estimate(model, example) if table.is_corrected else table.correct_by(model, example)
    return (MACs(1.0) if isinstance(budget, RankRule) else budget).measure(model, example)


def goal_of(
    budget: Budget | RankRule,
    model: nn.Module,
    current: float,
    table: LatencyTable | None = None,
    fraction: float | None = None,
) -> Goal:
    """Return the goal for a network that has ``current`` of the quantity, after ``fraction`` of the way to the budget.

    Without ``fraction`` the goal is the budget itself; under a rule the quantity is not limited.
    """
    limit = final = current
    if isinstance(budget, Budget):
        dense = state_of(model).reference(budget.quantity, lambda: current)
        limit = final = budget.goal(dense)
        if fraction is not None:
            limit = max(budget.at(dense, fraction), final)
    return Goal(budget, current, limit, final, price_of(budget, model), table)


def price_of(budget: Budget | RankRule, model: nn.Module) -> Callable[[float, float], Any] | None:
    """Return what a layer costs from its multiply-accumulates and weights; None for latency, which has to be timed.

    The budget measures a small layer with one position and with two: what is added per position is the cost of the
    multiply-accumulates, and the rest is the cost of the weights.

    Args:
        budget: any budget whose quantity is a sum over layers.
        model: determines the dtype and device of the weights.

    Example:
        >>> from lightning_light.budgets import Size
        >>> price_of(MACs(0.5), nn.Linear(2, 2))(10.0, 3.0), price_of(Size("1 kB"), nn.Linear(2, 2))(10.0, 3.0)
        (10.0, 12.0)
    """
    if isinstance(budget, Latency):
        return None
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    layer = _allocated(nn.Linear(_PRICED, _PRICED, bias=False, device="meta"), weight)  # draws no random number
    one, two = (
        quantity_of(budget, layer, ExampleInput((torch.zeros(1, n, _PRICED).to(weight),))) / _PRICED**2 for n in (1, 2)
    )
    return lambda macs, params: (two - one) * macs + (2 * one - two) * params


class LayerTimer:
    """Time layers on inputs of the size they see, one sample at a time; every measurement is made once.

    Args:
        model: holds the layers, and determines device and dtype.
        runs: number of timed calls; the median counts.
    """

    def __init__(self, model: nn.Module, runs: int = 15) -> None:
        self._model, self._runs = model, runs
        self._measured: dict[tuple[str, str, Ranks], float] = {}

    def __call__(self, layer: FactorizableLayer, form: str, ranks: Ranks) -> float:
        """Return the seconds of ``layer`` in ``form``, or of the layer as it is for the form ``""``."""
        key = layer.name, form, ranks
        if key not in self._measured:
            self._measured[key] = self._seconds(*self._built(layer, form, ranks))
        return self._measured[key]

    def _built(self, layer: FactorizableLayer, form: str, ranks: Ranks) -> tuple[nn.Module, Tensor]:
        """Return the layer in the form, and an input of it."""
        module = self._current(layer)
        weight: Any = next(module.parameters())
        if form:
            module = _allocated(build_factors(module, form, ranks), weight)
        return module, torch.full((1, *layer.shape), 0.5, dtype=weight.dtype, device=weight.device)

    def _seconds(self, module: nn.Module, x: Tensor) -> float:
        with isolated(module):
            call = synchronized(module, ExampleInput((x,)))
            return measure_latency(call, warmup=_WARMUP, runs=self._runs).median

    def _current(self, layer: FactorizableLayer) -> nn.Module:
        if not layer.owner:
            return self._model.get_submodule(layer.name)
        linear = nn.Linear(layer.weight.shape[2], layer.weight.shape[1], device="meta")
        return _allocated(linear, layer.weight)


class FileTimer(LayerTimer):
    """Estimate what layers add to the latency of the network's file; measure the file of a factorized copy.

    Args:
        model: holds the layers.
        table: of the runtime.
    """

    def __init__(self, model: nn.Module, table: LatencyTable) -> None:
        super().__init__(model)
        self._table = table

    @override
    def _seconds(self, module: nn.Module, x: Tensor) -> float:
        return self._table.estimate_part(module, ExampleInput((x,)))

    def factorized(self, entry: Mapping[str, Any]) -> nn.Module:
        """Copy the network with the factors of an entry of the edit log, whose weights have other values."""
        copied = copy_network(self._model)
        replay_factors(copied, entry)
        for name, _, _ in entry["layers"]:
            like = next(parameter for parameter in self._model.parameters() if parameter.is_floating_point())
            put_module(copied, name, _allocated(copied.get_submodule(name), like))
        return copied


class OutputProbe:
    """Measure how much the network's output changes when one layer has the weight that its factors multiply to.

    The change is ``||y - y'||^2 / ||y||^2`` over all batches. The weight is put in and taken out again; nothing else
    is changed.

    Args:
        model: left as found.
        calls: the batches.
    """

    def __init__(self, model: nn.Module, calls: Sequence[ExampleInput]) -> None:
        self._model, self._calls = model, list(calls)
        self._reference = self._outputs()

    def __call__(self, layer: FactorizableLayer, spectrum: Spectrum, ranks: Ranks) -> float:
        """Return the relative squared change of the output with ``layer`` at ``ranks``."""
        weight = self._weight(layer)
        groups = layer.weight.shape[2 if spectrum.form == "depthwise" else 0]
        product = compose(spectrum.form, spectrum.factors(ranks), groups)
        with _replaced(weight, product.reshape(weight.shape)):
            outputs = self._outputs()
        pairs = list(zip(self._reference, outputs, strict=True))
        change = sum(float((a - b).square().sum()) for a, b in pairs)
        return change / max(sum(float(a.square().sum()) for a, _ in pairs), 1e-300)

    def _outputs(self) -> list[Tensor]:
        with isolated(self._model):
            outputs = [self._model(*call.args, **call.kwargs) for call in self._calls]
        return [tensor.double() for tensor in tensors_in(outputs) if tensor.is_floating_point()]

    def _weight(self, layer: FactorizableLayer) -> Tensor:
        module: Any = self._model.get_submodule(layer.owner or layer.name)
        if layer.owner:
            return split_weights(module, layer.parts)[layer.name.removeprefix(f"{layer.owner}.")].detach()
        weight: Tensor = module.weight
        return weight.detach()


@contextmanager
def _replaced(weight: Tensor, value: Tensor) -> Iterator[None]:
    before = weight.clone()
    weight.copy_(value)
    try:
        yield
    finally:
        weight.copy_(before)


def _allocated(module: nn.Module, like: Tensor) -> nn.Module:
    """Copy a module, whose bias may be the user's, with small constant weights on the device and dtype of ``like``."""
    module = copy.deepcopy(module).to_empty(device=like.device).to(like.dtype)
    for parameter in module.parameters():
        nn.init.constant_(parameter, 0.01)
    return module
