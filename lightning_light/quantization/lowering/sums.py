"""A layer as every runtime computes it: whole numbers, multiplied once, rounded once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_light.quantization.lowering.weights import Scale, Weight
from lightning_light.quantization.operations import set_argument

__all__ = ["Kernels", "in_whole_numbers", "kernels_of"]

Kernels = Literal["whole", "fbgemm", "onednn"]

_GROUPS = 100  # torch gives oneDNN convolutions with no more of them, on processors with VNNI


def in_whole_numbers(
    function: Any,
    args: list[Any],
    kwargs: dict[str, Any],
    weight: Weight,
    reads: Scale,
    writes: Scale,
    high: int,
    kernels: Kernels = "whole",
) -> Tensor:
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
        kernels: whose order; those of the x86 engine, FBGEMM and oneDNN, add biases in float.
    """
    x: Tensor = args[0] if args else kwargs["input"]
    columns = [-1, *[1] * (weight.integers.dim() - 2)]
    unit, bias = weight.scale.float() * reads[0], weight.bias
    counted = None if bias is None else (bias.double() / (weight.scale * reads[0])).round().float()
    set_argument(args, kwargs, 0, "input", (x * (1.0 / reads[0])).round_())
    set_argument(args, kwargs, 1, "weight", weight.integers.float())
    set_argument(args, kwargs, 2, "bias", counted if kernels == "whole" else None)
    with torch.autocast(x.device.type, enabled=False):
        sums: Tensor = function(*args, **kwargs)
    sums, zero = sums.round_(), writes[1]  # also where a convolution is not computed as a sum
    added = torch.zeros(()) if bias is None else bias.reshape(columns)
    if kernels == "onednn":
        whole = _as_onednn(sums, weight.scale.float().reshape(columns), added, reads[0], writes)
    else:
        sums = sums if kernels == "whole" else sums + added / unit.reshape(columns)
        whole = (sums * (unit / writes[0]).reshape(columns)).round_()
    return whole.clamp_(-zero, high - zero).mul_(writes[0])


def _as_onednn(sums: Tensor, scale: Tensor, bias: Tensor, reads: float, writes: Scale) -> Tensor:
    """Which is given ``1 / s_x``, multiplies by one scale after the other, and rounds with the zero point added."""
    single = 1.0 / (1.0 / torch.tensor(reads, dtype=torch.float32))
    return ((sums * single * scale + bias) * (1.0 / writes[0]) + writes[1]).round_() - writes[1]


def kernels_of(engine: str, name: str, args: Mapping[str, Any]) -> Kernels:
    """Whose kernels compute an operation with these arguments, by name."""
    if engine != "x86":
        return "whole"
    return "onednn" if name.startswith("conv") and args.get("groups", 1) <= _GROUPS else "fbgemm"
