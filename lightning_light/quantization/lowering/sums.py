"""A layer as every runtime computes it: whole numbers, multiplied once, rounded once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_light.quantization.lowering.weights import Scale, Weight
from lightning_light.quantization.operations import set_argument

__all__ = ["in_whole_numbers"]


def in_whole_numbers(
    function: Any, args: list[Any], kwargs: dict[str, Any], weight: Weight, reads: Scale, writes: Scale, high: int,
    *, whole_bias: bool = True,
) -> Tensor:  # fmt: skip
    """``s_y * clamp(round(m * (sum of q_x * q_w + q_b)), -z_y, high - z_y)`` with ``m = s_x * s_w / s_y``.

    Sums of whole numbers are exact in float32 up to 2**24, whatever their order. The rest is done in float32 and in
    this order by QNNPACK, XNNPACK and ONNX Runtime, so that not one number falls on the other side of a half.

    Args:
        function: the operation: a convolution or a linear layer.
        args: its arguments; what it reads, in float32, is on the grid of ``reads``.
        kwargs: likewise.
        weight: with the batch norm folded.
        reads: scale and zero point of what it reads.
        writes: of what comes out: after the batch norm, and after a ReLU if the zero point is 0.
        high: steps of that grid.
        whole_bias: False for the x86 engine, which adds the bias in float, and the zero point before it rounds.
    """
    x: Tensor = args[0] if args else kwargs["input"]
    columns = [-1, *[1] * (weight.integers.dim() - 2)]
    unit, bias = weight.scale.float() * reads[0], weight.bias
    if bias is not None and whole_bias:
        bias = (bias.double() / (weight.scale * reads[0])).round().float()
    set_argument(args, kwargs, 0, "input", (x * (1.0 / reads[0])).round_())
    set_argument(args, kwargs, 1, "weight", weight.integers.float())
    set_argument(args, kwargs, 2, "bias", bias if whole_bias else None)
    with torch.autocast(x.device.type, enabled=False):
        sums: Tensor = function(*args, **kwargs)
    sums = sums.round_()  # also where a convolution is not computed as a sum
    if whole_bias:
        whole = (sums * (unit / writes[0]).reshape(columns)).round_()
    else:
        single = sums * unit.reshape(columns) + (0.0 if bias is None else bias.reshape(columns))
        whole = (single * (1.0 / writes[0]) + writes[1]).round_() - writes[1]
    return whole.clamp_(-writes[1], high - writes[1]).mul_(writes[0])
