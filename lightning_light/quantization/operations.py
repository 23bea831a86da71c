"""Which operations have an int8 kernel, and which only move numbers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch.nn.functional as F
from torch import Tensor

__all__ = ["ADDING", "BATCH_NORM", "HEAVY", "arguments", "kind_of", "moves", "name_of", "set_argument"]

HEAVY: Final = frozenset({"conv", "transposed", "linear"})
"""Kinds with a weight: what quantization is about."""

ADDING: Final = frozenset({"add", "mul"})
BATCH_NORM: Final = "batch_norm"
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


def moves(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call only moves numbers, so that they stay on their grid; zero is on every grid, other fillings not.

    So does the first step of ``sum(branches)``, which adds 0.
    """
    if kind_of(name) in ADDING:
        given = [*args, *kwargs.values()]
        others = [value for value in given if not isinstance(value, Tensor)]
        if len(given) != 2 or len(others) != 1 or type(others[0]) not in (int, float):  # a symbol must not be asked
            return False
        return bool(others[0] == (0 if kind_of(name) == "add" else 1))
    if name == "pad":
        mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant")
        return mode == "constant" and not (args[3] if len(args) > 3 else kwargs.get("value"))
    return kind_of(name) == "move"


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


def set_argument(args: list[Any], kwargs: dict[str, Any], place: int, name: str, value: Any) -> None:
    """Put a value in the place of an argument, however the caller passed it."""
    if len(args) > place:
        args[place] = value
    else:
        kwargs[name] = value
