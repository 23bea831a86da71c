"""What a network costs, what one layer takes on this machine, and what one layer's factors change in the output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_light.budgets import Budget
from lightning_light.example_input import ExampleInput, tensors_in
from lightning_light.lowrank.attention import opened_weights
from lightning_light.lowrank.build import build_factors, compose
from lightning_light.lowrank.layers import Layer
from lightning_light.lowrank.spectra import Ranks, Spectrum
from lightning_light.measure.cost import count_cost
from lightning_light.measure.isolation import isolated
from lightning_light.measure.latency import measure_latency
from lightning_light.measure.size import tensor_bytes

__all__ = ["LayerTimer", "OutputProbe", "quantity"]


def quantity(model: nn.Module, budget: Budget | None, example: ExampleInput) -> float:
    """What ``budget`` counts, of ``model`` as it stands: MACs (of one sample) without one."""
    kind = "macs" if budget is None else budget.quantity
    if kind == "macs":
        return count_cost(model, example.args, example.kwargs, shapes_only=False).macs / example.samples
    if kind == "params":
        return float(sum(parameter.numel() for parameter in model.parameters()))
    if kind == "bytes":
        return float(tensor_bytes(model))
    with isolated(model):
        return measure_latency(
            _synchronized(model, lambda: model(*example.args, **example.kwargs)), warmup=3, runs=20
        ).median


class LayerTimer:
    """Times single layers on inputs of the size that they see, one sample at a time; each question once.

    Args:
        model: holds the layers, and says on which device and in which type.
        runs: timed calls; the median counts.
    """

    def __init__(self, model: nn.Module, runs: int = 15) -> None:
        self._model, self._runs = model, runs
        self._known: dict[tuple[str, str, Ranks], float] = {}

    def __call__(self, layer: Layer, form: str, ranks: Ranks) -> float:
        """Seconds of ``layer`` in ``form``, or as it is for ``""``."""
        key = layer.name, form, ranks
        if key not in self._known:
            module = self._dense(layer)
            weight: Any = next(module.parameters())
            if form:
                module = build_factors(module, form, ranks).to_empty(device=weight.device).to(weight.dtype)
                for parameter in module.parameters():
                    nn.init.constant_(parameter, 0.01)
            x = torch.full((1, *layer.shape), 0.5, dtype=weight.dtype, device=weight.device)
            with isolated(module):
                call = _synchronized(module, lambda: module(x))
                self._known[key] = measure_latency(call, warmup=3, runs=self._runs).median
        return self._known[key]

    def _dense(self, layer: Layer) -> nn.Module:
        if not layer.owner:
            return self._model.get_submodule(layer.name)
        linear = nn.Linear(layer.weight.shape[2], layer.weight.shape[1], device="meta")
        linear = linear.to_empty(device=layer.weight.device).to(layer.weight.dtype)
        for parameter in linear.parameters():
            nn.init.constant_(parameter, 0.01)
        return linear


class OutputProbe:
    """How much the network's output changes when one layer has the weight that its factors multiply to.

    ``||y - y'||^2 / ||y||^2`` over all batches. The weight is put in and taken out again; nothing else is touched.

    Args:
        model: left as found.
        calls: the batches.
    """

    def __init__(self, model: nn.Module, calls: Sequence[ExampleInput]) -> None:
        self._model, self._calls = model, list(calls)
        self._reference = self._outputs()

    def __call__(self, layer: Layer, spectrum: Spectrum, ranks: Ranks) -> float:
        """The change with ``layer`` at ``ranks``."""
        weight = self._weight(layer)
        factored = compose(spectrum.form, spectrum.factors(ranks), layer.weight.shape[0])
        with _replaced(weight, factored.reshape(weight.shape)):
            outputs = self._outputs()
        pairs = list(zip(self._reference, outputs, strict=True))
        changed = sum(float((a - b).square().sum()) for a, b in pairs)
        return changed / max(sum(float(a.square().sum()) for a, _ in pairs), 1e-300)

    def _outputs(self) -> list[Tensor]:
        with isolated(self._model):
            outputs = [self._model(*call.args, **call.kwargs) for call in self._calls]
        return [tensor.double() for tensor in tensors_in(outputs) if tensor.is_floating_point()]

    def _weight(self, layer: Layer) -> Tensor:
        module: Any = self._model.get_submodule(layer.owner or layer.name)
        if layer.owner:
            return opened_weights(module, layer.blocks)[layer.name.removeprefix(f"{layer.owner}.")].detach()
        found: Tensor = module.weight
        return found.detach()


@contextmanager
def _replaced(weight: Tensor, value: Tensor) -> Iterator[None]:
    before = weight.clone()
    weight.copy_(value)
    try:
        yield
    finally:
        weight.copy_(before)


def _synchronized(model: nn.Module, call: Any) -> Any:
    if not any(parameter.is_cuda for parameter in model.parameters()):
        return call

    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run
