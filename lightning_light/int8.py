"""What the ground knows of int8: that something rounds numbers in a network, and how a runtime is told to do the same.

An exporter asks for one of two forms, and traces; it does not have to know who has put the rounding there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_light.errors import UnsupportedError

__all__ = ["QUANTIZED_TENSORS_ARE_DEPRECATED", "Int8Form", "Int8Weights", "PairRules", "RoundsNumbers", "rounders_of"]

QUANTIZED_TENSORS_ARE_DEPRECATED = r"torch\.quantize_per_tensor, torch\.quantize_per_channel"
"""How torch's news begins that its int8 kernels will leave; whoever exports to them knows."""

_LIMITS = {"x86": 63}  # without VNNI two products have to fit into 16 bits


@dataclass(frozen=True)
class Int8Weights:
    """What weights are rounded to, as far as it is known before training.

    Attributes:
        engine: by whose rules.
        widest: the largest whole number of those of eight bits; 0 if there are none.
    """

    engine: str
    widest: int

    def check(self, engine: str) -> None:
        """Refuse the int8 kernels of an engine with a smaller range.

        Raises:
            UnsupportedError: says for which engine to train.
        """
        limit = _LIMITS.get(engine, 127)
        if self.widest > limit:
            raise UnsupportedError(
                f"`TorchScriptLite(engine={engine!r})`: expected weights that are rounded to [-{limit}, {limit}], "
                f"found [-{self.widest}, {self.widest}], by the rules of {self.engine!r}: sums would overflow. Train "
                f"with `Int8(engine={engine!r})`, or write `TorchScriptLite(engine='qnnpack')`."
            )


@dataclass
class Int8Form:
    """A network in a form that a runtime computes in int8.

    Attributes:
        packed: packed weights, which a tracer has to know.
        scales: the network's outputs, each tensor replaced by the scale of its grid: a scalar, 0 for none.
        layers: how many layers with a weight are int8.
        left_float: layers whose weights stay float, with the reason.
        modules: paths of the modules that int8 layers belong to.
    """

    packed: list[Any] = field(default_factory=list)
    scales: Any = None
    layers: int = 0
    left_float: dict[str, str] = field(default_factory=dict)
    modules: frozenset[str] = frozenset()


@dataclass(frozen=True)
class PairRules:
    """What a runtime asks of a graph of quantize and dequantize operations.

    Attributes:
        signed: whether numbers are in [-128, 127], else in [0, 255].
        join_on_one_grid: whether what is concatenated has to be on the grid of the result.
    """

    signed: bool
    join_on_one_grid: bool = False


class RoundsNumbers(ABC):
    """Owns forward hooks of a network, and rounds numbers in it.

    Attributes:
        engine: whose int8 kernels it rounds for.
    """

    engine: str

    @property
    @abstractmethod
    def is_rounding(self) -> bool:
        """Whether it does so now; before, it may only have watched."""

    @abstractmethod
    def on_kernels(self, call: Callable[[], Any], engine: str) -> AbstractContextManager[Int8Form]:
        """Inside, a forward pass runs on torch's int8 kernels where it rounded.

        Args:
            call: one forward pass in evaluation mode; from it weights and statistics are taken as they are now.
            engine: torch's name of the kernels.

        Raises:
            UnsupportedError: numbers were rounded for an engine with a wider range.
        """

    @abstractmethod
    def in_pairs(self, call: Callable[[], Any], rules: PairRules) -> AbstractContextManager[Int8Form]:
        """Inside, a forward pass writes each rounding as a quantize and a dequantize operation, weights as int8.

        Args:
            call: as above.
            rules: what the runtime asks for.
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
