"""What the ground knows of int8: that something rounds numbers in a network, and can run it on int8 kernels instead.

An exporter asks for the kernels, and traces; it does not have to know who has put the rounding there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

__all__ = ["QUANTIZED_TENSORS_ARE_DEPRECATED", "Kernels", "RoundsNumbers", "rounders_of"]

QUANTIZED_TENSORS_ARE_DEPRECATED = r"torch\.quantize_per_tensor, torch\.quantize_per_channel"
"""How torch's news begins that its int8 kernels will leave; whoever exports to them knows."""


@dataclass
class Kernels:
    """A network that computes with int8 kernels.

    Attributes:
        engine: torch's name of the kernels.
        packed: packed weights, which a tracer has to know.
        scales: of the network's outputs, in order; None for those that are not on a grid.
        layers: how many layers with a weight are int8.
        left_float: layers whose weights stay float, with the reason.
    """

    engine: str
    packed: list[Any] = field(default_factory=list)
    scales: list[float | None] = field(default_factory=list)
    layers: int = 0
    left_float: dict[str, str] = field(default_factory=dict)


class RoundsNumbers(ABC):
    """Owns forward hooks of a network, and rounds numbers in it."""

    @abstractmethod
    def on_kernels(self, call: Callable[[], Any]) -> AbstractContextManager[Kernels]:
        """Inside, a forward pass runs on int8 kernels where it rounded.

        Args:
            call: one forward pass in evaluation mode; from it weights and statistics are taken as they are now.
        """


def rounders_of(model: nn.Module) -> list[RoundsNumbers]:
    """Who rounds numbers in ``model``: found by its hooks."""
    found: dict[int, RoundsNumbers] = {}
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            owner = getattr(getattr(hook, "__self__", None), "frames", None)
            if isinstance(owner, RoundsNumbers):
                found[id(owner)] = owner
    return list(found.values())
