"""What a fit needs to know of the data: read off the inputs of layers, and off gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_light.example_input import ExampleInput, tensors_in
from lightning_light.lowrank.attention import opened_weights
from lightning_light.lowrank.build import factor_form
from lightning_light.lowrank.layers import Layer
from lightning_light.measure.isolation import isolated

__all__ = ["InputWatch", "add_gradients", "as_call", "from_batches", "mean_evidence"]

Sums = dict[str, dict[str, Tensor]]
"""Layer name -> kind of evidence -> running sum; under ``"count"`` over how many positions."""


class InputWatch:
    """Forward pre-hooks that add up moments of the inputs of ``layers``, while it is open.

    Attributes:
        is_open: whether what passes is counted.
    """

    def __init__(self, model: nn.Module, layers: Iterable[Layer], needs: frozenset[str]) -> None:
        self.is_open = False
        self.sums: Sums = {}
        self._needs = needs
        self._handles = []
        owners: dict[str, list[Layer]] = {}
        for layer in layers:
            owners.setdefault(layer.owner or layer.name, []).append(layer)
        for name, inside in owners.items():
            hook = self._hook(inside)
            self._handles.append(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Leave no hook behind."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, layers: list[Layer]) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self.is_open:
                for layer in layers:
                    x = _input_of(layer, module, args, kwargs)
                    if x is not None:
                        add_moments(self.sums.setdefault(layer.name, {}), _rows(module, x.detach()), self._needs)

        return look


def add_moments(sums: dict[str, Tensor], rows: Tensor, needs: frozenset[str]) -> None:
    """Add the positions ``rows``, of shape ``(groups, positions, in)``."""
    rows = rows if rows.dtype == torch.float64 else rows.float()
    new = {"count": torch.tensor(float(rows.shape[1]), dtype=torch.float64)}
    if "moment" in needs:
        new["moment"] = (rows.mT @ rows).double()
    if "absolute" in needs:
        new["absolute"] = rows.abs().sum(1).double()
    for kind, value in new.items():
        sums[kind] = sums[kind].to(value.device) + value if kind in sums else value


def add_gradients(sums: Sums, model: nn.Module, layers: Iterable[Layer], parameters: Iterable[nn.Parameter]) -> None:
    """Add the squared gradients of one optimizer step, summed over outputs, as they stand before clipping."""
    mine: set[Tensor] = set(parameters)
    for layer in layers:
        for weight, gradient in _gradients(layer, model.get_submodule(layer.owner or layer.name)):
            if weight in mine and gradient is not None:
                squares = gradient.detach().double().square()
                grouped = squares.reshape(layer.weight.shape[0], -1, *squares.shape[1:]).flatten(2)
                entry = sums.setdefault(layer.name, {})
                value = grouped.sum(1, keepdim=True)
                entry["grad_squared"] = entry["grad_squared"].to(value) + value if "grad_squared" in entry else value
                entry["steps"] = entry.get("steps", torch.zeros(())) + 1


def mean_evidence(sums: Sums) -> dict[str, dict[str, Tensor]]:
    """Means of what was gathered."""
    means: dict[str, dict[str, Tensor]] = {}
    for name, entry in sums.items():
        kinds = {kind: value for kind, value in entry.items() if kind not in {"count", "steps"}}
        counts = {kind: entry["steps" if kind == "grad_squared" else "count"] for kind in kinds}
        means[name] = {kind: value / counts[kind].to(value.device) for kind, value in kinds.items()}
    return means


def from_batches(
    model: nn.Module, layers: list[Layer], needs: frozenset[str], calls: Iterable[ExampleInput]
) -> dict[str, dict[str, Tensor]]:
    """Evidence from forward passes in evaluation mode; ``model`` is left as found."""
    with isolated(model):
        watch = InputWatch(model, layers, needs)
        watch.is_open = True
        try:
            for call in calls:
                model(*call.args, **call.kwargs)
        finally:
            watch.remove()
    return mean_evidence(watch.sums)


def calibration_calls(model: nn.Module, calibration: Iterable[Any] | None, batches: int) -> list[ExampleInput]:
    """The first ``batches`` of ``calibration``, as calls of ``model``; random state stays as it is."""
    if calibration is None:
        return []
    with torch.random.fork_rng(devices=[]):
        first = list(islice(iter(calibration), batches))
    return [as_call(batch, model) for batch in first]


def as_call(batch: Any, model: nn.Module) -> ExampleInput:
    """How the network is called with a batch: a mapping is keyword arguments; of a tuple or list the first item."""
    if isinstance(batch, Mapping):
        return ExampleInput(kwargs=dict(batch)).to(model)
    return ExampleInput((batch[0] if isinstance(batch, (list, tuple)) else batch,)).to(model)


def _input_of(layer: Layer, module: nn.Module, args: Any, kwargs: Any) -> Tensor | None:
    if not isinstance(module, nn.MultiheadAttention):
        return next(tensors_in((args, kwargs)))
    names = ("query", "key", "value")
    places = {"q_proj": 0, "k_proj": 1, "v_proj": 2}
    place = places.get(layer.name.removeprefix(f"{layer.owner}.").partition(".")[0])
    if place is None:
        return None  # what the output projection reads exists inside the attention's own kernel only
    found: Tensor = args[place] if len(args) > place else kwargs[names[place]]
    return found


def _rows(module: nn.Module, x: Tensor) -> Tensor:
    """The input as ``(groups, positions, in)``: for a convolution every patch that it reads."""
    layer: Any = module[0] if factor_form(module) else module  # type: ignore[index]
    if not isinstance(layer, nn.modules.conv._ConvNd):
        return x.reshape(1, -1, x.shape[-1])
    dims = len(layer.kernel_size)
    x = x if x.dim() == dims + 2 else x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    for dim in range(dims):
        size, stride, dilation = layer.kernel_size[dim], layer.stride[dim], layer.dilation[dim]
        x = x.unfold(2 + dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
    spots = x.movedim(1, 1 + dims).flatten(0, dims)  # (positions, in, *kernel)
    return spots.reshape(len(spots), layer.groups, -1).transpose(0, 1)


def _gradients(layer: Layer, module: nn.Module) -> list[tuple[Tensor, Tensor | None]]:
    """The parameter that holds the layer's matrix, and the part of its gradient that belongs to it."""
    if not layer.owner:
        weight: Any = module[0].weight if factor_form(module) else module.weight  # type: ignore[index]
        return [] if factor_form(module) else [(weight, weight.grad)]
    part = layer.name.removeprefix(f"{layer.owner}.")
    if isinstance(module, nn.MultiheadAttention) and part == "out_proj":
        return [(module.out_proj.weight, module.out_proj.weight.grad)]
    is_attention = isinstance(module, nn.MultiheadAttention)
    joint: Any = module.in_proj_weight if is_attention else module.weight
    place, parts = list(opened_weights(module, layer.blocks)).index(part), max(layer.blocks, 1)
    if joint is None:
        joint, place = getattr(module, f"{part.partition('.')[0]}_weight"), place % parts
    elif is_attention:
        parts *= 3
    return [(joint, None if joint.grad is None else joint.grad.chunk(parts)[place])]
