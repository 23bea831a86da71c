"""Which operations have an int8 kernel, and which only move numbers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch.nn.functional as F

__all__ = ["ADDING", "BATCH_NORM", "HEAVY", "arguments", "keeps_grid", "kind_of", "name_of"]

HEAVY: Final = frozenset({"conv", "transposed", "linear"})
"""Kinds with a weight: what quantization is about."""

ADDING: Final = frozenset({"add", "mul"})
BATCH_NORM: Final = "batch_norm"
_KEEPS_GRID = frozenset({"move", "pool"})

_NAMES = {
    "conv": "conv1d conv2d conv3d",
    "transposed": "conv_transpose1d conv_transpose2d conv_transpose3d",
    "linear": "linear",
    "batch_norm": "batch_norm",
    "relu": "relu relu_",
    "relu6": "relu6",
    "clamp": "hardtanh hardtanh_ clamp clamp_ clip",
    "add": "add add_ __add__ __iadd__ __radd__",
    "mul": "mul mul_ __mul__ __imul__ __rmul__ multiply",
    "cat": "cat concat concatenate",
    # The mean of values on a grid is put back on the same grid: what the engines do.
    "pool": "adaptive_avg_pool1d adaptive_avg_pool2d avg_pool2d mean",
    # What goes in comes out, elsewhere: no rounding is needed.
    "move": "flatten view reshape permute transpose squeeze unsqueeze max_pool1d max_pool2d adaptive_max_pool2d "
    "contiguous chunk split __getitem__ unflatten dropout dropout1d dropout2d dropout_ expand movedim narrow select "
    "to float type detach clone pad",
    "curve": "sigmoid hardsigmoid tanh hardswish hardswish_ leaky_relu leaky_relu_",
}
_KINDS = {name: kind for kind, names in _NAMES.items() for name in names.split()}


def name_of(function: Any) -> str:
    """What torch calls an operation: ``conv2d``, ``__add__``."""
    return str(getattr(function, "__name__", function))


def kind_of(name: str) -> str:
    """The kind of an operation; ``float`` for those that stay as they are."""
    return _KINDS.get(name, "float")


def keeps_grid(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the result is on the grid of what is given: the call only moves numbers, or takes means over space."""
    if name == "mean":
        return _is_over_space(args, kwargs)
    if name == "pad":
        return _is_with_zeros(args, kwargs)
    return kind_of(name) in _KEEPS_GRID


def _is_over_space(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    listed = [dims] if isinstance(dims, int) else list(dims or [])
    x = args[0] if args else kwargs["input"]
    return bool(x.dim() == 4 and {dim % 4 for dim in listed} == {2, 3})


def _is_with_zeros(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Zero is on every grid; the other modes have no int8 kernel."""
    mode, value = kwargs.get("mode", args[2] if len(args) > 2 else "constant"), kwargs.get("value")
    return mode == "constant" and not (args[3] if len(args) > 3 else value)


def arguments(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a layer or batch norm by name."""
    return {**dict(zip(_parameters(name), args, strict=False)), **kwargs}


_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


def _parameters(name: str) -> tuple[str, ...]:
    if name.startswith("conv"):
        return _TRANSPOSED if "transpose" in name else _CONVOLUTION
    return (
        tuple(inspect.signature(getattr(F, name)).parameters) if name == "batch_norm" else ("input", "weight", "bias")
    )
