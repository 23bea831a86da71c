"""Rounding with a gradient: straight through to the numbers, and to what is learned of a grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_light.quantization.rules import Grid

__all__ = ["SMALLEST", "learned_activation", "learned_weight", "on_grid", "straight_through"]

SMALLEST = 1e-8
"""A dead channel, or a tensor of zeros, has a scale too."""


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    @override
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """``rounded``, with a gradient of 1 to ``x``."""
    found: Tensor = _StraightThrough.apply(x, rounded) if x.requires_grad else rounded  # type: ignore[no-untyped-call]
    return found


class _OnGrid(torch.autograd.Function):
    """``s * clamp(round(x / s), low, high)`` in four passes that the CPU does in vectors.

    torch's own fused operation computes the same numbers one by one, and is ten times slower there.
    """

    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, scale: float, inverse: float, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.ends = (low - 0.5) * scale, (high + 0.5) * scale
        return _rounded(x, scale, inverse, low, high)

    @staticmethod
    @override
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradient, x, *ctx.ends), None, None, None, None


def _rounded(x: Tensor, scale: float, inverse: float, low: int, high: int) -> Tensor:
    return x.mul(inverse).round_().clamp_(low, high).mul_(scale)


def on_grid(x: Tensor, scale: float, low: int, high: int) -> Tensor:
    """``scale * clamp(round(x / scale), low, high)``; the gradient is 1 where nothing was cut off, else 0.

    To the last bit what `torch.fake_quantize_per_tensor_affine` gives.
    """
    single = torch.tensor(scale)  # the reciprocal is taken in float32 there
    scale, inverse = float(single), float(1.0 / single)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return _rounded(x, scale, inverse, low, high)
    found: Tensor = _OnGrid.apply(x, scale, inverse, low, high)  # type: ignore[no-untyped-call]
    return found


class _Learned(torch.autograd.Function):
    """As `_OnGrid`, with gradients to the scale and to the offset, and any shape of them."""

    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, scale: Tensor, offset: Tensor | None, low: int, high: int, share: float) -> Tensor:
        steps = x.mul(1.0 / scale).round_()
        if offset is None:
            zero, rounded = None, steps.clamp_(low, high).mul_(scale)
        else:
            zero = (-offset / scale).round().clamp_(0.0, high - low)  # zero stays on the grid
            rounded = steps.clamp_(low - zero, high - zero).mul_(scale)
        ctx.save_for_backward(x, scale, rounded, zero)
        ctx.ends, ctx.share = (low, high), share
        return rounded

    @staticmethod
    @override
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, scale, rounded, zero = ctx.saved_tensors
        low, high = ctx.ends
        steps = x / scale if zero is None else x / scale + zero
        inside = (steps > low) & (steps < high)
        through = gradient * inside
        # Inside round(v) - v, outside the end of the grid; v = (x - offset) / scale.
        ends = rounded / scale if zero is None else rounded / scale + zero
        of_scale = gradient * torch.where(inside, (rounded - x) / scale, ends)
        of_offset = None if zero is None else _summed(gradient - through, scale) * ctx.share
        return through, _summed(of_scale, scale) * ctx.share, of_offset, None, None, None


def _summed(gradient: Tensor, like: Tensor) -> Tensor:
    return gradient.sum_to_size(like.shape)


def _share(count: int, high: int) -> float:
    """LSQ's scale of a step size's gradient, ``1 / sqrt(N * high)``."""
    return float((count * max(high, 1)) ** -0.5)


def learned_weight(w: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """``s * clamp(round(w / s), low, high)`` with Esser's gradient to ``s``, of each channel or of all.

    Args:
        w: the weight.
        step: ``(channels,)`` or ``()``, above zero.
        low: the smallest whole number.
        high: the largest.
    """
    columns = step.reshape(-1, *[1] * (w.dim() - 1)) if step.dim() else step
    share = _share(w.numel() // max(step.numel(), 1), high)
    found: Tensor = _Learned.apply(w, columns, None, low, high, share)  # type: ignore[no-untyped-call]
    return found


def learned_activation(x: Tensor, grid: Grid, first: Tensor, offset: Tensor | None = None) -> Tensor:
    """``x`` on a grid of which something is learned, with gradients to it.

    - a step size: ``s * clamp(round(x / s), low, high)``, ``low`` 0 or, if there are numbers below zero, -2**(bits-1);
    - with an offset: ``s * clamp(round(x / s), -z, high - z)``, ``z = round(-offset / s)``: zero stays on the grid;
    - a clip: ``s * round(clamp(x, 0, a) / s)``, ``s = a / high``.

    ``N``, by whose root LSQ's gradients are divided, counts the numbers of one sample: a loss is the samples' mean.

    Args:
        x: the tensor.
        grid: what is known of it.
        first: the step size, or the clip; a number.
        offset: if it is learned, too.
    """
    single = x.float()
    if grid.learned == "clip":
        top = first.clamp_min(SMALLEST)
        clipped = torch.where(single < top, single, top).clamp_min(0.0)
        scale = top.detach() / grid.high
        return straight_through(clipped, clipped.detach().mul(1.0 / scale).round_().mul_(scale)).to(x.dtype)
    low = 0 if grid.positive or offset is not None else -(grid.high + 1) // 2
    high = grid.high + low
    share = _share(max(x[:1].numel(), 1), high)
    step = first.abs().clamp_min(SMALLEST)
    found: Tensor = _Learned.apply(single, step, offset, low, high, share)  # type: ignore[no-untyped-call]
    return found.to(x.dtype)
