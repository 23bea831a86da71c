"""Batch norm in evaluation, as the affine function that is folded into the layer before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["gain_and_shift"]


def gain_and_shift(norm: Mapping[str, Any], bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``gain = gamma / sqrt(var + eps)`` and ``shift = beta + (bias - mean) * gain``, per channel, in float64.

    Args:
        norm: arguments of ``batch_norm`` by name.
        bias: of the layer before it.
    """
    gain = (norm["running_var"].double() + norm.get("eps", 1e-5)).rsqrt()
    if norm.get("weight") is not None:
        gain = gain * norm["weight"].detach().double()
    centered = (0.0 if bias is None else bias.detach().double()) - norm["running_mean"].double()
    beta = 0.0 if norm.get("bias") is None else norm["bias"].detach().double()
    return gain, beta + centered * gain
