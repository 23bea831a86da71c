"""The arithmetic: ranges -> grids, and numbers rounded to them with a straight-through gradient."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_light.quantization.learning import SMALLEST, learned_weight, on_grid, straight_through
from lightning_light.quantization.rules import Grid, WeightRule

__all__ = [
    "integers",
    "is_traced",
    "merge",
    "round_activation",
    "round_at_run_time",
    "round_weight",
    "scales_of",
    "single",
]


def scales_of(grids: Sequence[Grid], ranges: Tensor) -> list[tuple[float, int] | None]:
    """Scale and zero point of each grid: ``s = (top - low) / high``, ``z = round(-low / s)``, 0 always on the grid.

    Scales are numbers of float32, so that every way to write ``x / s`` rounds alike.

    Args:
        grids: what is known beforehand; ``high`` is 255 for eight bits.
        ranges: ``(len(grids), 2)``, the smallest and largest value that each has to hold; infinite where nothing has
            been seen, which has no scale.

    Example:
        >>> scales_of([Grid(), Grid(positive=True, cap=6.0)], torch.tensor([[-1.0, 4.0], [-3.0, 9.0]]))
        [(0.0196..., 51), (0.0235..., 0)]
    """
    found: list[tuple[float, int] | None] = []
    for grid, (low, top) in zip(grids, ranges.double().tolist(), strict=True):
        if grid.at_run_time or not (math.isfinite(low) and math.isfinite(top)):
            found.append(None)
            continue
        low = 0.0 if grid.positive else min(low, 0.0)
        top = max(top if grid.cap is None else min(top, grid.cap), 0.0)
        width = top - low if top > low else 1.0  # zeros are on any grid; on a wide one numbers may grow later
        scale = single(max(width / grid.high, SMALLEST))  # as the runtimes hold it
        found.append((scale, min(max(round(-low / scale), 0), grid.high)))
    return found


def single(x: float) -> float:
    """The nearest number of float32."""
    found: float = struct.unpack("f", struct.pack("f", x))[0]
    return found


def merge(ranges: Tensor, batch: Tensor, shares: Tensor) -> Tensor:
    """The moving average of ranges, where the batch has finite ones; the first of them is taken as it is.

    Args:
        ranges: ``(n, 2)``, infinite where nothing has been seen.
        batch: ``(n, 2)``, infinite where this batch has not been there.
        shares: ``(n,)``, weight of the batch; nan for the widest range of all.
    """
    columns = shares[:, None]
    wide = torch.stack([torch.minimum(ranges[:, 0], batch[:, 0]), torch.maximum(ranges[:, 1], batch[:, 1])], 1)
    averaged = torch.where(columns.isnan(), wide, torch.lerp(ranges, batch, columns.nan_to_num()))
    return torch.where(batch.isfinite(), torch.where(ranges.isfinite(), averaged, batch), ranges)


def round_activation(x: Tensor, scale: float, zero: int, high: int) -> Tensor:
    """``(clamp(round(x / s) + z, 0, high) - z) * s``; the gradient is 1 within the range and 0 outside."""
    single = x.float()
    if x.device.type != "cpu" or is_traced():
        return torch.fake_quantize_per_tensor_affine(single, scale, zero, 0, high).to(x.dtype)
    return on_grid(single, scale, -zero, high - zero).to(x.dtype)


def round_at_run_time(x: Tensor, grid: Grid) -> Tensor:
    """Rounded to the range of ``x`` itself; nothing is cut off, so the gradient is 1."""
    single = x.float()
    low, top = torch.aminmax(single.detach())
    low, top = low.clamp_max(0.0), top.clamp_min(0.0)
    scale = ((top - low) / grid.high).clamp_min(SMALLEST)
    zero = (-low / scale).round()
    rounded = (single.detach() / scale).round_().clamp_(-zero, grid.high - zero).mul_(scale)
    return straight_through(single, rounded).to(x.dtype)


def integers(w: Tensor, rule: WeightRule, step: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The whole numbers ``q`` and the scale ``s`` for which ``s * q`` is the rounded weight.

    - uniform: ``q = clamp(round(w / s), low, high)``, ``s = max|w| / high``, or ``step`` if that is learned;
    - ternary: ``q = sign(w)`` where ``|w| > 0.7 * mean|w|``, else 0; ``s`` is the mean ``|w|`` of the former;
    - binary: ``q = sign(w)``, ``s = mean|w|``.

    SparsityReport count in no mean and stay zero, so that masks survive.

    Args:
        w: the weight; no gradient is followed.
        rule: how it is rounded.
        step: the learned scale, if it is learned and known.

    Returns:
        ``q`` like ``w``, in floating point, and ``s``: ``(channels,)`` or ``()``.
    """
    w = w.detach().float()
    rows = w.flatten(1) if rule.per_channel else w.flatten()
    magnitude = rows.abs()
    if rule.form != "uniform":
        kept = magnitude > (0.7 * _mean(magnitude, magnitude > 0) if rule.form == "ternary" else 0.0)
        return (rows.sign() * kept).view_as(w), _mean(magnitude, kept)[..., 0].clamp_min(SMALLEST)
    scale = magnitude.amax(-1) / rule.high if step is None else step.detach().float().abs()
    scale = scale.clamp_min(SMALLEST)
    return (rows * (1.0 / scale)[..., None]).round_().clamp_(rule.low, rule.high).view_as(w), scale


def _mean(magnitude: Tensor, kept: Tensor) -> Tensor:
    return (magnitude * kept).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp_min(1)


def round_weight(w: Tensor, rule: WeightRule, step: Tensor | None = None) -> Tensor:
    """The rounded weight; the gradient is 1 everywhere, but for binary weights only where ``|w| <= 1``.

    One scale a channel goes with the batch norm that is folded in: ``round(g * w) = g * round(w)`` for any ``g`` that
    is one number a channel. So training may round the weight alone, and every batch norm computes as it is written.

    Args:
        w: the weight.
        rule: how it is rounded.
        step: the learned scale, which gets its gradient.
    """
    if step is not None and rule.learned and torch.is_grad_enabled():
        return learned_weight(w.float(), step.float().abs().clamp_min(SMALLEST), rule.low, rule.high).to(w.dtype)
    q, scale = integers(w, rule, step)
    columns = scale.reshape(-1, *[1] * (w.dim() - 1)) if scale.dim() else scale
    if rule.form == "uniform" and is_traced():
        return _fused_weight(w, rule, scale)
    if rule.form == "binary":
        w = w.clamp(-1.0, 1.0)
    return straight_through(w, q.mul_(columns).to(w.dtype))


def _fused_weight(w: Tensor, rule: WeightRule, scale: Tensor) -> Tensor:
    zero = torch.zeros_like(scale, dtype=torch.int32)
    if scale.dim():
        rounded = torch.fake_quantize_per_channel_affine(w.float(), scale, zero, 0, rule.low, rule.high)
    else:
        rounded = torch.fake_quantize_per_tensor_affine(w.float(), scale, zero, rule.low, rule.high)
    return rounded.to(w.dtype)


def is_traced() -> bool:
    """Exporters know torch's own operation."""
    return torch._C._get_tracing_state() is not None or torch.compiler.is_compiling()
