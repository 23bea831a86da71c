"""A layer's weight as whole numbers, with the batch norm that follows folded into their scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_light.quantization.learning import SMALLEST
from lightning_light.quantization.rounding import integers
from lightning_light.quantization.rules import WeightRule

__all__ = ["Weight", "filled", "folded", "gain_and_shift", "in_one_place"]


@dataclass(frozen=True, eq=False)
class Weight:
    """``integers * scale`` is the weight that was trained with, times what the batch norm multiplies by.

    Attributes:
        integers: int8, the shape of the weight.
        scale: float64; one an output channel (the first dimension), or a scalar.
        bias: float32, or None.
    """

    integers: Tensor
    scale: Tensor
    bias: Tensor | None

    @property
    def per_channel(self) -> bool:
        """Whether there is one scale a channel."""
        return self.scale.dim() > 0

    def value(self) -> Tensor:
        """The weight in float."""
        scale = self.scale.float()
        columns = scale.reshape(-1, *[1] * (self.integers.dim() - 1)) if self.per_channel else scale
        return self.integers.float() * columns


def folded(args: Mapping[str, Any], norm: Mapping[str, Any] | None, rule: WeightRule, step: Tensor | None) -> Weight:
    """``q * s`` as in training, then ``s * g`` for a batch norm with gain ``g = gamma / sqrt(var + eps)``.

    The sum after it is ``beta + (bias - mean) * g``. All of it is computed in float64.

    Args:
        args: of the layer, by name.
        norm: those of the batch norm, or None.
        rule: how the weight is rounded; per channel if there is a batch norm.
        step: its scale, if that is learned.
    """
    bias = args.get("bias")
    bias = None if bias is None else bias.detach().float()
    whole, scale = integers(args["weight"], rule, step)
    if norm is None:
        return Weight(whole.to(torch.int8), filled(scale, whole), bias)
    gain, shift = gain_and_shift(norm, bias)
    whole = whole * gain.sign().float().reshape(-1, *[1] * (whole.dim() - 1))
    return Weight(whole.to(torch.int8), filled(scale.double() * gain.abs(), whole), shift)


def in_one_place(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """The same weights, whose scales of channels share one storage, and biases another.

    A file has a record for each storage, which costs some two hundred bytes: more than the scales of sixteen channels.

    Example:
        >>> two = {name: Weight(torch.ones(2, 3), torch.rand(2).double(), torch.rand(2)) for name in "ab"}
        >>> placed = in_one_place(two)
        >>> placed["b"].scale.equal(two["b"].scale), placed["b"].scale.storage_offset()
        (True, 2)
    """
    scales = _joined({key: weight.scale for key, weight in weights.items() if weight.per_channel})
    biases = _joined({key: weight.bias for key, weight in weights.items() if weight.bias is not None})
    return {
        key: replace(weight, scale=scales.get(key, weight.scale), bias=biases.get(key))
        for key, weight in weights.items()
    }


def _joined(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not parts:
        return {}
    views = torch.split(torch.cat(list(parts.values())), [len(part) for part in parts.values()])
    return dict(zip(parts, views, strict=True))


def filled(scale: Tensor, whole: Tensor) -> Tensor:
    """Scales in float64, those of channels of zeros the largest of all: a bias counted in tiny ones would overflow."""
    scale = scale.double().clamp_min(SMALLEST)
    if not scale.dim():
        return scale
    empty = ~whole.flatten(1).any(1)
    return torch.where(empty, scale.masked_fill(empty, SMALLEST).amax(), scale)


def gain_and_shift(norm: Mapping[str, Any], bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a batch norm multiplies by, and what it then adds, in evaluation; ``bias`` is that of the layer before."""
    gain = (norm["running_var"].double() + norm.get("eps", 1e-5)).rsqrt()
    if norm.get("weight") is not None:
        gain = gain * norm["weight"].detach().double()
    shift = -norm["running_mean"].double() if bias is None else bias.double() - norm["running_mean"].double()
    beta = 0.0 if norm.get("bias") is None else norm["bias"].detach().double()
    return gain, (beta + shift * gain).float()
