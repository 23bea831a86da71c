"""Recipes that learn quantization parameters along with the weights."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from lightning_light.quantization.observers import LSQObserver, MovingAverage, MSEObserver
from lightning_light.quantization.recipes import Recipe, activation_spec, check_bits
from lightning_light.quantization.specs import LayerSpec

__all__ = ["LSQ", "PACT"]


@dataclass(frozen=True, repr=False)
class LSQ(Recipe):
    """Learn the scale of every weight and activation along with the weights (learned step size quantization).

    ``x_hat = s * clamp(round(x / s), low, top)``; the gradient to ``s`` is ``round(x / s) - x / s`` within the range
    and ``low`` or ``top`` outside, times ``1 / sqrt(N * top)``, ``N`` the number of values that share ``s``. Weights
    have ``low = -2**(n-1)`` and a scale per output channel (the paper: per layer), activations after a ReLU
    ``low = 0``. Scales begin with ``2 * mean|x| / sqrt(top)``.

    Esser et al., 2020, "Learned Step Size Quantization". https://arxiv.org/abs/1902.08153
    With ``offset``: Bhalgat et al., 2020, "LSQ+: Improving low-bit quantization through learnable offsets and better
    initialization". https://arxiv.org/abs/2004.09576

    Example:
        >>> from lightning_light.quantization import Int8, MixedPrecision
        >>> MixedPrecision(default=LSQ(weights=4, activations=4), first=Int8(), last=Int8())
        MixedPrecision(default=LSQ(), first=Int8(), last=Int8())

    Args:
        weights: bits, 2 to 8.
        activations: bits of what layers read, 2 to 8; None leaves it float.
        offset: activations learn an offset too; their range begins with the smallest squared error.
        engine: as in `Recipe`.
        exclude: as in `Recipe`.

    Raises:
        ValueError: an argument out of range.
    """

    weights: int = 4
    activations: int | None = 4
    offset: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self, self.weights, self.activations)

    @override
    def spec(self) -> LayerSpec:
        observer = MSEObserver(momentum=0.1) if self.offset else LSQObserver()
        activation = activation_spec(self.activations, observer, "scale and offset" if self.offset else "scale")
        return LayerSpec(self._weight(self.weights, learned=True), activation)


@dataclass(frozen=True, repr=False)
class PACT(Recipe):
    """Learn the value ``a`` at which a ReLU is clipped: ``x_hat = s * round(clamp(x, 0, a) / s)``.

    ``s = a / (2**n - 1)``; the gradient to ``a`` is 1 where ``x >= a``, else 0. The regularization of ``a`` that the
    paper asks for is the weight decay of its group in the optimizer. Tensors that can be below zero, such as the
    network's input, keep an observed range; weights are quantized as by `IntN` (the paper: as by DoReFa).

    Choi et al., 2018, "PACT: Parameterized Clipping Activation for Quantized Neural Networks".
    https://arxiv.org/abs/1805.06085

    Args:
        weights: bits, 2 to 8.
        activations: bits of what layers read, 2 to 8.
        engine: as in `Recipe`.
        exclude: as in `Recipe`.

    Raises:
        ValueError: an argument out of range.
    """

    weights: int = 4
    activations: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self, self.weights, self.activations, may_be_float=False)

    @override
    def spec(self) -> LayerSpec:
        return LayerSpec(
            self._weight(self.weights), activation_spec(self.activations, MovingAverage(momentum=0.1), "clip")
        )
