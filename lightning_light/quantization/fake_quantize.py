"""The arithmetic of fake quantization: ranges -> quantization parameters -> quantized values with gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_light.batch_norm import scale_and_shift
from lightning_light.quantization.specs import ActivationSpec, QParams, WeightSpec

__all__ = [
    "SMALLEST_SCALE",
    "columns",
    "dampening_gradient",
    "fake_quantize",
    "fake_quantize_bias",
    "fake_quantize_dynamic",
    "fake_quantize_learned",
    "fake_quantize_weight",
    "gain_and_shift",
    "initial_scale",
    "merge_ranges",
    "qparams_of",
    "quantize_weight",
    "widest",
]

SMALLEST_SCALE = 1e-8
"""A dead channel, or a tensor of zeros, has a scale too."""


def qparams_of(specs: Sequence[ActivationSpec], ranges: Tensor) -> list[QParams | None]:
    """``scale = (top - low) / quant_max``, ``zero_point = round(-low / scale)``; the range always holds 0.

    Scales are float32 numbers, as runtimes hold them.

    Args:
        specs: of the activations.
        ranges: ``(len(specs), 2)``, the smallest and largest value of each; infinite where nothing was observed, which
            has no quantization parameters.

    Example:
        >>> specs = [ActivationSpec(), ActivationSpec(non_negative=True, upper_bound=6.0)]
        >>> qparams_of(specs, torch.tensor([[-1.0, 4.0], [-3.0, 9.0]]))
        [QParams(scale=0.0196..., zero_point=51, quant_max=255), QParams(scale=0.0235..., zero_point=0, quant_max=255)]
    """
    found: list[QParams | None] = []
    for spec, (low, top) in zip(specs, ranges.double().tolist(), strict=True):
        if spec.is_dynamic or not (math.isfinite(low) and math.isfinite(top)):
            found.append(None)
            continue
        low = 0.0 if spec.non_negative else min(low, 0.0)
        top = max(top if spec.upper_bound is None else min(top, spec.upper_bound), 0.0)
        width = top - low if top > low else 1.0  # zeros fit any scale; with a wide one values may grow later
        scale = _float32(max(width / spec.quant_max, SMALLEST_SCALE))
        found.append(QParams(scale, min(max(round(-low / scale), 0), spec.quant_max), spec.quant_max))
    return found


def _float32(x: float) -> float:
    """The nearest float32 number."""
    return float(np.float32(x))


def merge_ranges(ranges: Tensor, batch: Tensor, momentum: Tensor) -> Tensor:
    """The moving average of ranges, where the batch has finite ones; the first of them is taken as it is.

    Args:
        ranges: ``(n, 2)``, infinite where nothing was observed.
        batch: ``(n, 2)``, infinite where this batch was not observed.
        momentum: ``(n,)``, weight of the batch; nan for the widest range of all batches.
    """
    weight = momentum[:, None]
    averaged = torch.where(weight.isnan(), widest(ranges, batch), torch.lerp(ranges, batch, weight.nan_to_num()))
    return torch.where(batch.isfinite(), torch.where(ranges.isfinite(), averaged, batch), ranges)


def widest(first: Tensor, second: Tensor) -> Tensor:
    """The smallest ranges that hold both, ``(..., 2)``."""
    return torch.stack([torch.minimum(first, second)[..., 0], torch.maximum(first, second)[..., 1]], -1)


# Activations.


def fake_quantize(x: Tensor, qparams: QParams) -> Tensor:
    """``(clamp(round(x / scale) + zero_point, 0, quant_max) - zero_point) * scale``; gradient 1 inside, else 0.

    To the last bit what `torch.fake_quantize_per_tensor_affine` computes, which is ten times slower on the CPU.
    """
    scale, zero_point, top = qparams
    if x.device.type != "cpu":
        return torch.fake_quantize_per_tensor_affine(x.float(), scale, zero_point, 0, top).to(x.dtype)
    scale = _float32(scale)
    inverse, low, high = _float32(1.0 / scale), -zero_point, top - zero_point  # torch takes the reciprocal in float32
    single = x.float()
    quantized = single.detach().mul(inverse).round_().clamp_(low, high).mul_(scale)
    return _straight_through(single, quantized, ((low - 0.5) * scale, (high + 0.5) * scale)).to(x.dtype)


def fake_quantize_dynamic(x: Tensor, spec: ActivationSpec) -> Tensor:
    """Quantized to the range of ``x`` itself; the gradient is 1. Written with operators that ONNX has."""
    single = x.float()
    values = single.detach()
    low, top = values.min().clamp_max(0.0), values.max().clamp_min(0.0)
    scale = ((top - low) / spec.quant_max).clamp_min(SMALLEST_SCALE)
    zero_point = (-low / scale).round()
    rounded = torch.minimum(torch.maximum((values / scale).round(), -zero_point), spec.quant_max - zero_point) * scale
    return _straight_through(single, rounded).to(x.dtype)


def fake_quantize_learned(x: Tensor, spec: ActivationSpec, first: Tensor, offset: Tensor | None = None) -> Tensor:
    """Fake-quantize an activation with learned quantization parameters, with gradients to them.

    - a scale: ``s * clamp(round(x / s), low, top)``, ``low`` 0 or, for values of both signs, ``-2**(bits - 1)``;
    - with an offset: ``s * clamp(round(x / s), -z, top - z)``, ``z = round(-offset / s)``, so that 0 is exact;
    - a clip: ``s * round(clamp(x, 0, a) / s)``, ``s = a / quant_max``.

    ``N``, by whose root LSQ divides gradients, counts the values of one sample: a loss is the mean over samples.

    Args:
        x: the activation.
        spec: how it is quantized.
        first: the scale, or the clip; a scalar.
        offset: if it is learned too.
    """
    single = x.float()
    if spec.learned == "clip":
        top = first.clamp_min(SMALLEST_SCALE)
        clipped = torch.where(single < top, single, top).clamp_min(0.0)
        scale = top.detach() / spec.quant_max
        return _straight_through(clipped, clipped.detach().mul(1.0 / scale).round_().mul_(scale)).to(x.dtype)
    low = 0 if spec.non_negative or offset is not None else -(spec.quant_max + 1) // 2
    return _with_learned_scale(single, first, offset, low, spec.quant_max + low, max(x[:1].numel(), 1)).to(x.dtype)


# Weights.


def quantize_weight(w: Tensor, spec: WeightSpec, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Integers ``q`` and scale ``s`` for which ``s * q`` is the fake-quantized weight.

    - uniform: ``q = clamp(round(w / s), quant_min, quant_max)``, ``s = max|w| / quant_max``, or the learned ``scale``;
    - ternary: ``q = sign(w)`` where ``|w| > 0.7 * mean|w|``, else 0; ``s`` is the mean ``|w|`` of the former;
    - binary: ``q = sign(w)``, ``s = mean|w|``.

    Zeros do not count in the means and stay zero, so that masks survive.

    Args:
        w: the weight; no gradient is followed.
        spec: how it is quantized.
        scale: the learned scale, if it is learned and known.

    Returns:
        ``q`` like ``w``, in floating point, and ``s``: ``(channels,)`` or ``()``.
    """
    w, rows = w.detach().float(), _rows(w, spec)
    if spec.form != "uniform":
        magnitude = rows.abs()
        kept = magnitude > (0.7 * _mean(magnitude, magnitude > 0) if spec.form == "ternary" else 0.0)
        return w.sign().mul_(kept.view_as(w)), _mean(magnitude, kept)[..., 0].clamp_min(SMALLEST_SCALE)
    found = rows.abs().amax(-1) / spec.quant_max if scale is None else scale.detach().float().abs()
    found = found.clamp_min(SMALLEST_SCALE)
    return (w * columns(1.0 / found, w)).round_().clamp_(spec.quant_min, spec.quant_max), found


def fake_quantize_weight(w: Tensor, spec: WeightSpec, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The fake-quantized weight and its scale; the gradient is 1, for binary weights only where ``|w| <= 1``.

    One scale per channel commutes with the batch norm that is folded in: ``quantize(g * w) = g * quantize(w)`` for a
    gain ``g`` per channel. So training may quantize the weight alone, and every batch norm computes as it is written.

    Args:
        w: the weight.
        spec: how it is quantized.
        scale: the learned scale, which gets its gradient.
    """
    if scale is not None and spec.learned:
        count = w.numel() // max(scale.numel(), 1)
        ends = (spec.quant_min, spec.quant_max)
        learned = _with_learned_scale(w.float(), columns(scale.float(), w), None, *ends, count).to(w.dtype)
        return learned, scale.detach().float().abs().clamp_min(SMALLEST_SCALE)
    q, found = quantize_weight(w, spec)
    if spec.form == "binary":
        w = w.clamp(-1.0, 1.0)
    return _straight_through(w, q.mul_(columns(found, w)).to(w.dtype)), found


def dampening_gradient(w: Tensor, spec: WeightSpec, scale: Tensor) -> Tensor:
    """Return the gradient of ``dampening * sum((w_hat - clamp(w, s * quant_min, s * quant_max)) ** 2)``.

    ``w_hat``, the fake-quantized weight, is a constant; the learned scale gets no gradient.

    Nagel et al., 2022, "Overcoming Oscillations in Quantization-Aware Training", equation 7.
    https://arxiv.org/abs/2203.11086

    Args:
        w: the weight; no gradient is followed.
        spec: how it is quantized.
        scale: the learned scale, of each output channel or of all.
    """
    w, scale = w.detach().float(), scale.detach()
    quantized, found = fake_quantize_weight(w, spec, scale)
    step = columns(found, w)
    inside = (w >= step * spec.quant_min) & (w <= step * spec.quant_max)
    return 2.0 * spec.dampening * (w - quantized) * inside


def fake_quantize_bias(bias: Tensor, unit: Tensor) -> Tensor:
    """``unit * round(bias / unit)``, gradient 1; kernels add an int32 bias, in units of input times weight."""
    exact = bias.detach().double()
    return _straight_through(bias, ((exact / unit).round() * unit).to(bias.dtype))


def initial_scale(w: Tensor, spec: WeightSpec) -> Tensor:
    """The scale that LSQ begins with: ``2 * mean|w| / sqrt(quant_max)``; zeros of a mask do not count."""
    magnitude = _rows(w, spec).abs()
    mean = _mean(magnitude, magnitude > 0)[..., 0]
    return (2.0 * mean / math.sqrt(max(spec.quant_max, 1))).clamp_min(SMALLEST_SCALE)


def _rows(w: Tensor, spec: WeightSpec) -> Tensor:
    """The weight in float32, a row per scale."""
    w = w.detach().float()
    return w.flatten(1) if spec.per_channel else w.flatten()


def _mean(magnitude: Tensor, kept: Tensor) -> Tensor:
    return (magnitude * kept).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp_min(1)


def columns(scale: Tensor, w: Tensor) -> Tensor:
    """``scale`` of each output channel, or of all, in a shape that broadcasts to ``w``."""
    return scale.reshape(-1, *[1] * (w.dim() - 1)) if scale.dim() else scale


def gain_and_shift(norm: Mapping[str, Any], bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Batch norm as ``gain = gamma / sqrt(var + eps)`` and ``shift = beta + (bias - mean) * gain``, in float64.

    Args:
        norm: arguments of ``batch_norm`` by name.
        bias: of the layer before it.
    """
    mean, var = norm["running_mean"].double(), norm["running_var"].double()
    others = [None if x is None else x.detach().double() for x in (norm.get("weight"), norm.get("bias"), bias)]
    return scale_and_shift(mean, var, norm.get("eps", 1e-5), *others)


def _straight_through(x: Tensor, rounded: Tensor, ends: tuple[float, float] | None = None) -> Tensor:
    """``rounded``, with a gradient of 1 to ``x``, but 0 outside of ``ends``.

    ``rounded`` is a new tensor, no view of another: it is returned itself, so that it can be changed in place.
    """
    if not (x.requires_grad and torch.is_grad_enabled()):
        return rounded
    found: Tensor = _StraightThrough.apply(x, rounded, ends)  # type: ignore[no-untyped-call]
    return found


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, rounded: Tensor, ends: tuple[float, float] | None) -> Tensor:
        ctx.ends = ends
        if ends is not None:
            ctx.save_for_backward(x)
        ctx.mark_dirty(rounded)
        return rounded

    @staticmethod
    @override
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if ctx.ends is not None:
            gradient = torch.ops.aten.hardtanh_backward(gradient, *ctx.saved_tensors, *ctx.ends)
        return gradient, None, None


def _with_learned_scale(x: Tensor, scale: Tensor, offset: Tensor | None, low: int, top: int, count: int) -> Tensor:
    """LSQ and LSQ+ as their papers write them, for any shape of ``scale``; ``count`` values share one.

    Esser et al. divide the gradients to scale and offset by ``sqrt(count * top)``.
    """
    factor = (count * max(top, 1)) ** -0.5
    scale, shift = scale.abs().clamp_min(SMALLEST_SCALE), None if offset is None else -offset
    for learned in (scale, shift):
        if learned is not None and learned.requires_grad:
            learned.register_hook(lambda gradient: gradient * factor)  # type: ignore[no-untyped-call]
    ends: list[Any] = [low, top]
    if shift is not None:
        steps = shift / scale
        zero_point = _straight_through(steps, steps.detach().round().clamp(0, top - low))  # 0 stays exact
        ends = [low - zero_point, top - zero_point]
    clipped = (x * (1.0 / scale)).clamp(*ends)
    return _straight_through(clipped, clipped.detach().round()) * scale
