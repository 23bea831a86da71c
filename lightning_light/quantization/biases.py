"""Biases are whole numbers in a kernel, and so they are where a rounded network is evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_light.quantization.operations import arguments
from lightning_light.quantization.plan import Plan
from lightning_light.quantization.rounding import integers
from lightning_light.quantization.rules import WeightRule
from lightning_light.quantization.weights import gain_and_shift

__all__ = ["WholeBiases"]

_FLOAT = "x86"  # the one engine that adds biases in float


class WholeBiases:
    """Adds what a kernel's bias is off: ``u * round(b / u) - b`` with ``u`` the scale of what is read times the weight's.

    It is a small part of a step of the output's grid. But one in some thousand numbers lies so near to a half that it
    falls on the other side, and layer by layer they become many: without this, files of ResNet-20 told other classes
    than the module for 0.6 % of all images.

    Args:
        plan: of the network.
        engine: whose rules.
    """

    def __init__(self, plan: Plan, engine: str) -> None:
        self._plan, self._engine = plan, engine
        self._off: dict[str, Tensor] = {}
        self._folded: dict[str, tuple[Tensor, Tensor | None]] = {}  # batch norm: unit and bias of its layer

    def note(
        self, key: str, name: str, args: list[Any], kwargs: Mapping[str, Any], rule: WeightRule, step: Tensor | None,
        scale: tuple[float, int] | None,
    ) -> None:  # fmt: skip
        """A layer is about to compute.

        Args:
            key: its name.
            name: of the operation.
            args: its arguments.
            kwargs: likewise.
            rule: how its weight is rounded.
            step: the scale of its weight, if that is learned.
            scale: of the numbers that it reads.
        """
        batch_norm = self._plan.groups[key].batch_norm
        given = arguments(name, args, kwargs)
        bias = given.get("bias")
        if self._engine == _FLOAT or scale is None or (bias is None and batch_norm is None):
            return
        unit = scale[0] * integers(given["weight"], rule, step)[1].double()
        if batch_norm is not None:
            self._folded[batch_norm] = unit, bias
        elif bias is not None:
            self._off[key] = _off(bias.double(), unit)

    def add(self, key: str, name: str, args: list[Any], kwargs: Mapping[str, Any], result: Tensor) -> Tensor:
        """``result`` as the kernel would have it; itself if the operation has no bias."""
        if key in self._folded:
            unit, bias = self._folded.pop(key)
            gain, shift = gain_and_shift(arguments(name, args, kwargs), bias)
            off = _off(shift.double(), (unit * gain.abs()).clamp_min(torch.finfo(torch.float32).tiny))
        elif key in self._off:
            off = self._off.pop(key)
        else:
            return result
        channels = off.to(result.dtype)
        return result + (channels if name == "linear" else channels.reshape(-1, *[1] * (result.dim() - 2)))


def _off(bias: Tensor, unit: Tensor) -> Tensor:
    return (bias / unit).round() * unit - bias
