"""Observe the ranges of all quantized activations of a network, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_light.quantization.fake_quantize import SMALLEST_SCALE
from lightning_light.quantization.learned_qparams import weight_scale
from lightning_light.quantization.op_calls import OpId
from lightning_light.quantization.specs import ActivationSpec, WeightSpec

__all__ = ["RangeObserver"]


class RangeObserver:
    """Collects what the observers of the activations find.

    Args:
        specs: of the activations.

    Attributes:
        momentum: ``(n,)``, weight of a new batch in each moving average; nan for the widest range of all batches.
        weight_scales: LSQ's first scale of each learned weight that was seen, by name.
    """

    def __init__(self, specs: Sequence[ActivationSpec]) -> None:
        momenta = (spec.observer.momentum for spec in specs)
        self.momentum = torch.tensor([torch.nan if momentum is None else momentum for momentum in momenta])
        self.weight_scales: dict[str, Tensor] = {}
        self._found: dict[int, Tensor] = {}

    def observe(self, activation: int, spec: ActivationSpec, x: Tensor) -> None:
        """Take in the values of one activation."""
        if spec.is_dynamic or not x.numel():
            return
        found = spec.observer.range_of(x.detach().float(), spec.quant_max, spec.non_negative)
        if spec.non_negative:
            found = found.clamp_min(0.0)
        if (before := self._found.get(activation)) is not None:
            found = torch.stack([torch.minimum(before[0], found[0]), torch.maximum(before[1], found[1])])
        self._found[activation] = found

    def observe_weight(self, op: OpId, w: Tensor, spec: WeightSpec) -> None:
        """``2 * mean|w| / sqrt(quant_max)`` per channel or tensor; zeros of a mask do not count."""
        magnitude = w.detach().float().abs()
        magnitude = magnitude.flatten(1) if spec.per_channel else magnitude.flatten()
        mean = magnitude.sum(-1) / (magnitude > 0).sum(-1).clamp_min(1)
        self.weight_scales[weight_scale(op)] = (2.0 * mean / max(spec.quant_max, 1) ** 0.5).clamp_min(SMALLEST_SCALE)

    def take(self, device: torch.device) -> Tensor:
        """``(n, 2)``: the ranges since the last call; (inf, -inf) where nothing was observed."""
        nothing = torch.tensor([torch.inf, -torch.inf], device=device)
        ranges = [self._found.get(activation, nothing).to(device) for activation in range(len(self.momentum))]
        self._found = {}
        return torch.stack(ranges) if ranges else torch.empty(0, 2, device=device)
