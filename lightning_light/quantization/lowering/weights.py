"""A layer's weight as whole numbers, with the batch norm that follows folded into their scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_light.quantization.rounding import integers
from lightning_light.quantization.rules import WeightRule

__all__ = ["Scale", "Weight", "folded", "in_one_place"]

Scale = tuple[float, int]

_COARSEST = 256.0  # XNNPACK does not load a file with more
_MOST = 2.0**30  # of the 32 bits that a kernel adds in; products take the rest


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

    def is_too_coarse(self, reads: float, writes: float) -> bool:
        """Whether one step of the sums is more than the whole grid that they are put on, of scale ``writes``."""
        return reads * float(self.scale.max()) >= _COARSEST * writes

    def value(self) -> Tensor:
        """The weight in float."""
        scale = self.scale.float()
        columns = scale.reshape(-1, *[1] * (self.integers.dim() - 1)) if self.per_channel else scale
        return self.integers.float() * columns


def folded(
    args: Mapping[str, Any],
    norm: Mapping[str, Any] | None,
    rule: WeightRule,
    step: Tensor | None,
    reads: float,
    writes: float,
) -> Weight:
    """``q * s`` as in training, then ``s * g`` for a batch norm with gain ``g = gamma / sqrt(var + eps)``.

    The sum after it is ``beta + (bias - mean) * g``. All of it is computed in float64.

    A kernel counts biases in ``reads * s``, in 32 bits, and multiplies by ``reads * s / writes`` at last. Where ``s``
    is too small for that, as in a channel that is all but dead, it takes the smallest one that fits, and fewer steps
    for the weight: what is lost is far below a step of the output.

    Args:
        args: of the layer, by name.
        norm: those of the batch norm, or None.
        rule: how the weight is rounded; per channel if there is a batch norm.
        step: its scale, if that is learned.
        reads: the scale of what the layer reads.
        writes: the scale of what comes out of it.
    """
    bias = args.get("bias")
    bias = None if bias is None else bias.detach().float()
    whole, scale = integers(args["weight"], rule, step)
    if norm is None:
        return _fitting(whole, scale.double(), bias, reads, writes)
    gain, shift = _gain_and_shift(norm, bias)
    whole = whole * gain.sign().float().reshape(-1, *[1] * (whole.dim() - 1))
    return _fitting(whole, scale.double() * gain.abs(), shift, reads, writes)


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


def _fitting(whole: Tensor, scale: Tensor, bias: Tensor | None, reads: float, writes: float) -> Weight:
    most = torch.full_like(scale, writes)
    if bias is not None:
        largest = bias.double().abs()
        most = torch.maximum(most, largest if scale.dim() else largest.amax())
    fitting = torch.maximum(scale, most / (_MOST * reads))
    share = scale / fitting
    whole = (whole * (share.reshape(-1, *[1] * (whole.dim() - 1)) if scale.dim() else share)).round()
    return Weight(whole.to(torch.int8), fitting, bias)


def _gain_and_shift(norm: Mapping[str, Any], bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a batch norm multiplies by, and what it then adds, in evaluation; ``bias`` is that of the layer before."""
    gain = (norm["running_var"].double() + norm.get("eps", 1e-5)).rsqrt()
    if norm.get("weight") is not None:
        gain = gain * norm["weight"].detach().double()
    shift = -norm["running_mean"].double() if bias is None else bias.double() - norm["running_mean"].double()
    beta = 0.0 if norm.get("bias") is None else norm["bias"].detach().double()
    return gain, (beta + shift * gain).float()
