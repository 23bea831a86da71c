"""Batch norms that follow no layer: one product and one sum, which every runtime computes alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["Affine", "affine_of"]

Affine = tuple[Tensor, Tensor]


def affine_of(args: Mapping[str, Any]) -> Affine | None:
    """The factor and the summand of each channel, shaped to broadcast, in float32; computed in float64.

    Args:
        args: of the batch norm, by name.

    Returns:
        None if it uses the statistics of its batch, or reads other numbers than float32.
    """
    mean, variance, x = args.get("running_mean"), args.get("running_var"), args["input"]
    if args.get("training") or mean is None or variance is None or x.dtype is not torch.float32:
        return None
    gain = (variance.double() + args.get("eps", 1e-5)).rsqrt()
    if args.get("weight") is not None:
        gain = gain * args["weight"].double()
    shift = -mean.double() * gain
    if args.get("bias") is not None:
        shift = shift + args["bias"].double()
    columns = [-1, *[1] * (x.dim() - 2)]
    return gain.float().reshape(columns), shift.float().reshape(columns)
