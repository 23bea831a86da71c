"""A layer's weight as integers, with the batch norm that follows folded into their scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_light.quantization.fake_quantize import columns, gain_and_shift, quantize_weight
from lightning_light.quantization.specs import WeightSpec

__all__ = ["QuantizedWeight", "fold", "share_storage"]

_COARSEST = 256.0  # XNNPACK does not load a file with more
_MOST = 2.0**30  # of the 32 bits in which a kernel accumulates; products take the rest


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """``integers * scale`` is the fake-quantized weight, times the gain of the batch norm.

    Attributes:
        integers: int8, the shape of the weight.
        scale: float64; one per output channel (the first dimension), or a scalar.
        bias: float32, or None.
    """

    integers: Tensor
    scale: Tensor
    bias: Tensor | None

    @property
    def per_channel(self) -> bool:
        """Whether there is one scale per channel."""
        return self.scale.dim() > 0

    def is_too_coarse(self, reads: float, writes: float) -> bool:
        """Whether one step of the accumulator is more than the whole range of an output of scale ``writes``."""
        return reads * float(self.scale.max()) >= _COARSEST * writes


def fold(
    named: Mapping[str, Any],
    norm: Mapping[str, Any] | None,
    spec: WeightSpec,
    scale: Tensor | None,
    reads: float,
    writes: float,
) -> QuantizedWeight:
    """Quantize a weight as in training, and multiply its scales by the gain of the batch norm after it.

    A kernel counts the bias in steps of ``reads * scale``, in 32 bits, and multiplies by ``reads * scale / writes`` in
    the end. Where the scale is too small for that, as in an almost dead channel, it becomes the smallest one that fits,
    with fewer steps for the weight: what is lost is far below a step of the output.

    Args:
        named: arguments of the layer by name.
        norm: arguments of the batch norm, or None.
        spec: how the weight is quantized.
        scale: of the weight, if that is learned.
        reads: scale of the layer's input.
        writes: scale of its output.
    """
    bias = named.get("bias")
    bias = None if bias is None else bias.detach().float()
    integers, found = quantize_weight(named["weight"], spec, scale)
    found = found.double()
    if norm is not None:
        gain, shift = gain_and_shift(norm, bias)
        integers, found, bias = integers * columns(gain.sign().float(), integers), found * gain.abs(), shift.float()
    most = torch.full_like(found, writes)
    if bias is not None:
        largest = bias.double().abs()
        most = torch.maximum(most, largest if found.dim() else largest.amax())
    fitting = torch.maximum(found, most / (_MOST * reads))
    return QuantizedWeight((integers * columns(found / fitting, integers)).round().to(torch.int8), fitting, bias)


def share_storage(weights: Mapping[Any, QuantizedWeight]) -> dict[Any, QuantizedWeight]:
    """The same weights, whose scales per channel share one storage, and biases another.

    A `.ptl` file has a record per storage, which costs some two hundred bytes: more than the scales of 16 channels.

    Example:
        >>> two = {name: QuantizedWeight(torch.ones(2, 3), torch.rand(2).double(), torch.rand(2)) for name in "ab"}
        >>> shared = share_storage(two)
        >>> shared["b"].scale.equal(two["b"].scale), shared["b"].scale.storage_offset()
        (True, 2)
    """
    scales = _joined({key: weight.scale for key, weight in weights.items() if weight.per_channel})
    biases = _joined({key: weight.bias for key, weight in weights.items() if weight.bias is not None})
    return {
        key: replace(weight, scale=scales.get(key, weight.scale), bias=biases.get(key))
        for key, weight in weights.items()
    }


def _joined(parts: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    if not parts:
        return {}
    views = torch.split(torch.cat(list(parts.values())), [len(part) for part in parts.values()])
    return dict(zip(parts, views, strict=True))
