"""The same rounding, written down as pairs of ``quantized_decomposed`` operations, which every runtime's tools know."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from lightning_light.quantization.rounding import WEIGHT_LIMIT

__all__ = ["activation_pair", "weight_pair"]


def activation_pair(x: Tensor, scale: float, zero: int, highest: int) -> Tensor:
    """Quantize and dequantize: unsigned bytes."""
    grid = (scale, zero, 0, highest, torch.uint8)
    ops = _operations()
    return _tensor(ops.dequantize_per_tensor.default(ops.quantize_per_tensor.default(x, *grid), *grid))


def weight_pair(w: Tensor, scale: Tensor, per_channel: bool) -> Tensor:
    """Quantize and dequantize: signed bytes, symmetric."""
    ops = _operations()
    limits = (-WEIGHT_LIMIT, WEIGHT_LIMIT, torch.int8)
    if not per_channel:
        grid = (float(scale), 0, *limits)
        return _tensor(ops.dequantize_per_tensor.default(ops.quantize_per_tensor.default(w, *grid), *grid))
    channels = (scale, torch.zeros_like(scale, dtype=torch.int64), 0, *limits)
    return _tensor(ops.dequantize_per_channel.default(ops.quantize_per_channel.default(w, *channels), *channels))


def _operations() -> Any:
    importlib.import_module("torch.ao.quantization.fx._decomposed")  # registers them
    return torch.ops.quantized_decomposed


def _tensor(value: Any) -> Tensor:
    assert isinstance(value, Tensor)
    return value
