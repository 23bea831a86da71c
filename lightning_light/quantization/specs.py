"""How weights and activations are quantized: plain values, free of the recipe that they came from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, NamedTuple

from lightning_light.quantization.observers import DynamicObserver, MovingAverage, Observer
from lightning_light.validation import NonNegativeFloat, Range

__all__ = ["ActivationSpec", "LayerSpec", "QParams", "WeightSpec"]

WeightForm = Literal["uniform", "ternary", "binary"]
Learned = Literal["", "scale", "scale and offset", "clip"]
Bits = Annotated[int, Range(1, 16)]
_Level = Annotated[int, Range(-(2**15), 2**15)]


class QParams(NamedTuple):
    """Quantization parameters of a tensor: ``x = scale * (q - zero_point)`` with ``q`` in [0, quant_max]."""

    scale: float
    zero_point: int
    quant_max: int = 255


@dataclass(frozen=True)
class WeightSpec:
    """How a weight is quantized: ``w = scale * q`` with ``q`` in [quant_min, quant_max].

    Attributes:
        bits: of ``q``.
        quant_min: the smallest ``q``.
        quant_max: the largest ``q``.
        form: how ``q`` and the scale are computed.
        per_channel: one scale per output channel, the first dimension; else one per tensor.
        learned: whether the scale is trained.
        dampening: largest weight of the penalty on ``(scale * q - w) ** 2`` during training.
    """

    bits: Bits = 8
    quant_min: _Level = -127
    quant_max: _Level = 127
    form: WeightForm = "uniform"
    per_channel: bool = True
    learned: bool = False
    dampening: NonNegativeFloat = 0.0

    def with_min_bits(self, bits: int) -> WeightSpec:
        """The same with no fewer than ``bits``: a stage of a bit-width schedule."""
        if self.form != "uniform" or bits <= self.bits:
            return self
        top = 2 ** (bits - 1) - 1
        return replace(self, bits=bits, quant_min=-top - (self.quant_min < -self.quant_max), quant_max=top)

    def within(self, top: int) -> WeightSpec:
        """The same with ``q`` in [-top, top]."""
        return replace(self, quant_min=max(self.quant_min, -top), quant_max=min(self.quant_max, top))


@dataclass(frozen=True)
class ActivationSpec:
    """How an activation is quantized, and how its range is found.

    Attributes:
        non_negative: its operator ends in a ReLU, so that the zero point is 0.
        upper_bound: of its values, known beforehand: 6 for ReLU6.
        bits: of a quantized value.
        observer: finds the range.
        learned: which quantization parameters are trained, from the observed range on.
    """

    non_negative: bool = False
    upper_bound: NonNegativeFloat | None = None
    bits: Bits = 8
    observer: Observer = MovingAverage()
    learned: Learned = ""

    @property
    def quant_max(self) -> int:
        """The largest quantized value; the smallest is 0."""
        return int(2**self.bits - 1)

    @property
    def is_dynamic(self) -> bool:
        """Whether the range is that of the tensor itself."""
        return isinstance(self.observer, DynamicObserver)

    def with_min_bits(self, bits: int) -> ActivationSpec:
        """The same with no fewer than ``bits``."""
        return self if bits <= self.bits else replace(self, bits=bits)


@dataclass(frozen=True)
class LayerSpec:
    """What a recipe prescribes for one layer.

    Attributes:
        weight: how its weight is quantized.
        activation: how its input is quantized; None: it stays float.
    """

    weight: WeightSpec = field(default_factory=WeightSpec)
    activation: ActivationSpec | None = field(default_factory=ActivationSpec)

    @property
    def no_kernel(self) -> str | None:
        """Why no int8 kernel computes this layer; None if one does."""
        if self.activation is None:
            return "only its weight is quantized, and int8 kernels read int8 activations"
        if self.activation.is_dynamic:
            return "its input is quantized dynamically"
        if self.activation.bits != 8:
            return f"no runtime has a kernel for activations of {self.activation.bits} bits"
        if self.weight.bits > 8:
            return f"no runtime has a kernel for weights of {self.weight.bits} bits"
        return None
