"""What a plan says of one weight and of one tensor: plain values, free of the recipe that they came from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lightning_light.quantization.observers import AtRunTime, MovingAverage, Observer, observer_of

__all__ = ["Grid", "LayerRule", "WeightRule"]

Form = Literal["uniform", "ternary", "binary"]
Learned = Literal["", "step", "step and offset", "clip"]


@dataclass(frozen=True)
class WeightRule:
    """How a weight is rounded: to ``scale * q`` with whole ``q`` in [low, high].

    Attributes:
        bits: of ``q``.
        low: the smallest ``q``.
        high: the largest ``q``.
        form: where ``q`` and the scale come from.
        per_channel: one scale an output channel, the first dimension; else one in all.
        learned: the scale is trained.
    """

    bits: int = 8
    low: int = -127
    high: int = 127
    form: Form = "uniform"
    per_channel: bool = True
    learned: bool = False

    def at(self, bits: int) -> WeightRule:
        """The same with no fewer than ``bits``: a rung of a ladder on the way down."""
        if self.form != "uniform" or bits <= self.bits:
            return self
        high = 2 ** (bits - 1) - 1
        return replace(self, bits=bits, low=-high - (self.low < -self.high), high=high)


@dataclass(frozen=True)
class Grid:
    """What is known of the values of one tensor before any was seen, and how their range is found.

    Attributes:
        positive: nothing is below zero: a ReLU is part of the operation.
        cap: nothing is above it.
        bits: the grid has ``2 ** bits`` values.
        observer: who finds the range.
        learned: what of the grid is trained, from the observed range on.
    """

    positive: bool = False
    cap: float | None = None
    bits: int = 8
    observer: Observer = MovingAverage()
    learned: Learned = ""

    @property
    def high(self) -> int:
        """The largest quantized value; the smallest is 0."""
        return int(2**self.bits - 1)

    @property
    def at_run_time(self) -> bool:
        """Whether the range is that of the tensor itself."""
        return isinstance(self.observer, AtRunTime)

    def at(self, bits: int) -> Grid:
        """The same with no fewer than ``bits``."""
        return self if bits <= self.bits else replace(self, bits=bits)

    def plain(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "positive": self.positive,
            "cap": self.cap,
            "bits": self.bits,
            "observer": self.observer.plain(),
            "learned": self.learned,
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Grid:
        """What `plain` wrote."""
        return cls(**{**plain, "observer": observer_of(plain["observer"])})


@dataclass(frozen=True)
class LayerRule:
    """What a recipe says of one layer.

    Attributes:
        weight: how its weight is rounded.
        activation: how the numbers are rounded that it reads; None: they are not.
    """

    weight: WeightRule = field(default_factory=WeightRule)
    activation: Grid | None = field(default_factory=Grid)

    @property
    def lacks_kernel(self) -> str | None:
        """Why no int8 kernel computes this layer; None if one does."""
        if self.activation is None:
            return "only its weight is rounded, and int8 kernels read whole numbers"
        if self.activation.at_run_time:
            return "the range of what it reads is found at run time"
        if self.activation.bits != 8:
            return f"no runtime has a kernel that reads numbers of {self.activation.bits} bits"
        if self.weight.bits > 8:
            return f"no runtime has a kernel for weights of {self.weight.bits} bits"
        return None
