"""The arithmetic: ranges -> grids, and numbers rounded to them with a straight-through gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_light.quantization.plan import Grid

__all__ = ["HIGHEST", "merge", "round_activation", "round_weight", "scales_of", "weight_scale"]

HIGHEST = 255  # the largest quantized activation; the smallest is 0
_SMALLEST = 1e-8  # a dead channel, or a tensor of zeros, has a scale too


def scales_of(grids: Sequence[Grid], ranges: Tensor) -> list[tuple[float, int] | None]:
    """Scale and zero point of each grid: ``s = (high - low) / 255``, ``z = round(-low / s)``, 0 always on the grid.

    Args:
        grids: what is known beforehand.
        ranges: ``(len(grids), 2)``, the smallest and largest value that each has to hold; infinite where nothing has
            been seen, which has no scale.

    Example:
        >>> scales_of([Grid(), Grid(positive=True, cap=6.0)], torch.tensor([[-1.0, 4.0], [-3.0, 9.0]]))
        [(0.0196..., 51), (0.0235..., 0)]
    """
    found: list[tuple[float, int] | None] = []
    for grid, (low, high) in zip(grids, ranges.double().tolist(), strict=True):
        if not (math.isfinite(low) and math.isfinite(high)):
            found.append(None)
            continue
        low = 0.0 if grid.positive else min(low, 0.0)
        high = max(high if grid.cap is None else min(high, grid.cap), 0.0)
        scale = max((high - low) / HIGHEST, _SMALLEST)
        found.append((scale, min(max(round(-low / scale), 0), HIGHEST)))
    return found


def merge(ranges: Tensor, batch: Tensor, averaging: float) -> Tensor:
    """The moving average of ranges, where the batch has finite ones; the first of them is taken as it is.

    Args:
        ranges: ``(n, 2)``, infinite where nothing has been seen.
        batch: ``(n, 2)``, infinite where this batch has not been there.
        averaging: weight of the batch.
    """
    averaged = torch.where(ranges.isfinite(), torch.lerp(ranges, batch, averaging), batch)
    return torch.where(batch.isfinite(), averaged, ranges)


def round_activation(x: Tensor, scale: float, zero: int) -> Tensor:
    """``(clamp(round(x / s) + z, 0, 255) - z) * s``; the gradient is 1 within the range and 0 outside."""
    return torch.fake_quantize_per_tensor_affine(x.float(), scale, zero, 0, HIGHEST).to(x.dtype)


def weight_scale(w: Tensor, limit: int, per_channel: bool) -> Tensor:
    """``max|w| / limit``, of each output channel (the first dimension) or of all."""
    largest = w.detach().float().abs()
    largest = largest.flatten(1).amax(1) if per_channel else largest.amax()
    return (largest / limit).clamp_min(_SMALLEST)


def round_weight(w: Tensor, limit: int, per_channel: bool) -> Tensor:
    """``clamp(round(w / s), -limit, limit) * s``; nothing is clipped, so the gradient is 1 everywhere.

    One scale a channel goes with the batch norm that is folded in: ``round(g * w) = g * round(w)`` for any ``g`` that
    is one number a channel. So training may round the weight alone, and every batch norm computes as it is written.
    """
    scale = weight_scale(w, limit, per_channel)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    if per_channel:
        rounded = torch.fake_quantize_per_channel_affine(w.float(), scale, zero, 0, -limit, limit)
    else:
        rounded = torch.fake_quantize_per_tensor_affine(w.float(), scale, zero, -limit, limit)
    return rounded.to(w.dtype)
