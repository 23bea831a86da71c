"""The interface between quantizers and exporters: what a fake-quantized network provides, and what a runtime needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_light.errors import UnsupportedError
from lightning_light.surgery.attachment import states_of
from lightning_light.warning_filters import ignored_warnings

__all__ = [
    "QUANTIZED_TENSORS_ARE_DEPRECATED",
    "Int8Weights",
    "REDUCED_MAX",
    "LoweredModel",
    "QDQConstraints",
    "Quantizer",
    "int8_kernels",
    "quantizers_of",
]

QUANTIZED_TENSORS_ARE_DEPRECATED = r"torch\.quantize_per_tensor, torch\.quantize_per_channel"
"""How torch's deprecation warning of its int8 kernels begins."""

REDUCED_MAX = 63
"""The largest weight of which two products with an activation fit in 16 bits, as on x86 without VNNI."""


@contextmanager
def int8_kernels(engine: str | None) -> Iterator[None]:
    """Inside, torch computes on the int8 kernels of ``engine``, or of the one that is set, without its deprecation."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = before if engine is None else engine
    try:
        with ignored_warnings(QUANTIZED_TENSORS_ARE_DEPRECATED):
            yield
    finally:
        torch.backends.quantized.engine = before


@dataclass(frozen=True)
class Int8Weights:
    """How weights are quantized, as far as it is known before training.

    Attributes:
        engine: for whose kernels.
        quant_max: of the weights of eight bits; 0 if there are none.
    """

    engine: str
    quant_max: int

    def check(self, engine: str) -> None:
        """Refuse the kernels of x86 for weights that need VNNI, unless they were quantized for it.

        Raises:
            UnsupportedError: names the engine to train for.
        """
        if engine == "x86" != self.engine and self.quant_max > REDUCED_MAX:
            raise UnsupportedError(
                f"`TorchScriptLite(engine={engine!r})`: expected weights quantized to [-{REDUCED_MAX}, {REDUCED_MAX}], "
                f"found [-{self.quant_max}, {self.quant_max}], for {self.engine!r}: sums would overflow. Train with "
                f"`Int8(engine={engine!r})`, or write `TorchScriptLite(engine='qnnpack')`."
            )


@dataclass
class LoweredModel:
    """A network that computes with the int8 operators of a runtime.

    Attributes:
        packed: packed weights, which a tracer has to know.
        output_scales: the network's outputs, each tensor replaced by its scale: a scalar, 0 for a float output.
        layers: how many layers with a weight are int8.
        left_float: layers whose weights stay float, with the reason.
        modules: paths of the modules that int8 layers belong to.
    """

    packed: list[Any] = field(default_factory=list)
    output_scales: Any = None
    layers: int = 0
    left_float: dict[str, str] = field(default_factory=dict)
    modules: frozenset[str] = frozenset()


@dataclass(frozen=True)
class QDQConstraints:
    """What a runtime requires of a QDQ graph.

    Attributes:
        runtime: its name in the op table: ``xnnpack`` or ``onnxruntime``.
        signed: whether activations are int8, in [-128, 127]; else uint8, in [0, 255].
    """

    runtime: str
    signed: bool


class Quantizer(ABC):
    """Fake-quantizes a network through forward hooks.

    Attributes:
        engine: for whose int8 kernels.
        enabled: whether it does so now; before, it may only observe.
    """

    engine: str
    enabled: bool

    @abstractmethod
    def quantized_ops(self, call: Callable[[], Any], engine: str) -> AbstractContextManager[LoweredModel]:
        """Inside, a forward pass runs on torch's int8 kernels where it was fake-quantized.

        Args:
            call: one forward pass in evaluation mode; from it weights and statistics are taken as they are now.
            engine: torch's name of the kernels.

        Raises:
            UnsupportedError: weights were quantized for an engine with a wider range.
        """

    @abstractmethod
    def qdq(
        self, call: Callable[[], Any], constraints: QDQConstraints, *, release_weights: bool = False
    ) -> AbstractContextManager[LoweredModel]:
        """Inside, a forward pass quantizes by a quantize and a dequantize operation, with weights in int8.

        Args:
            call: as above.
            constraints: of the runtime.
            release_weights: release the memory of each weight that exists in int8; the network is of no further use.
        """


def quantizers_of(model: nn.Module) -> list[Quantizer]:
    """The quantizers that are at work on ``model``, from the compression state of its modules."""
    actives = (active for state in states_of(model).values() for active in state.active)
    return [active for active in actives if isinstance(active, Quantizer)]
