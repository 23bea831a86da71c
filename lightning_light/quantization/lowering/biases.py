"""Biases are whole numbers in a kernel, and so they are where a rounded network is evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_light.quantization.lowering.weights import gain_and_shift
from lightning_light.quantization.operations import arguments, set_argument
from lightning_light.quantization.plan import Plan
from lightning_light.quantization.rounding import integers
from lightning_light.quantization.rules import WeightRule

__all__ = ["WholeBiases", "whole_bias"]

_FLOAT = "x86"  # the one engine that adds biases in float


class WholeBiases:
    """Adds what a kernel's bias is off: ``u * round(b / u) - b``, ``u`` the scale of what is read times the weight's.

    It is a small part of a step of the output's grid. But one in some thousand numbers lies so near to a half that it
    falls on the other side, and layer by layer they become many: without this, files of ResNet-20 told other classes
    than the module for 0.6 % of all images.

    Args:
        plan: of the network.
        engine: whose rules.
    """

    def __init__(self, plan: Plan, engine: str) -> None:
        self._plan, self._engine = plan, engine
        self._folded: dict[str, tuple[float, Tensor, Tensor | None]] = {}  # batch norm -> its layer

    def note(
        self, key: str, name: str, args: list[Any], kwargs: dict[str, Any], rule: WeightRule, step: Tensor | None,
        scale: tuple[float, int] | None,
    ) -> None:  # fmt: skip
        """A layer is about to compute: give it the bias, unless a batch norm is folded in, which has its say first.

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
        _, steps = integers(given["weight"], rule, step)
        if batch_norm is not None:
            self._folded[batch_norm] = scale[0], steps, bias
        elif bias is not None:
            set_argument(args, kwargs, 2, "bias", whole_bias(bias, scale[0] * steps.double()))

    def add(self, key: str, name: str, args: list[Any], kwargs: Mapping[str, Any], result: Tensor) -> Tensor:
        """``result`` of a folded batch norm as the kernel would have it; of another operation itself."""
        if key not in self._folded:
            return result
        scale, steps, bias = self._folded.pop(key)
        gain, shift = gain_and_shift(arguments(name, args, kwargs), bias)
        off = whole_bias(shift.double(), scale * steps.double() * gain.abs()) - shift.double()
        return result + off.to(result.dtype).reshape(-1, *[1] * (result.dim() - 2))


def whole_bias(bias: Tensor, unit: Tensor) -> Tensor:
    """The nearest multiple of ``unit``; itself where there is no unit: kernels take one that is small enough."""
    exact = bias.detach().double()
    return torch.where(unit > 0.0, (exact / unit).round() * unit, exact).to(bias.dtype)
