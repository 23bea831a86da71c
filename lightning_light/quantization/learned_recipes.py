"""Recipes that learn their grids along with the weights."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from lightning_light.quantization.observers import MSE, MovingAverage, StepSize
from lightning_light.quantization.recipes import Recipe, check_bits, grid_of
from lightning_light.quantization.rules import LayerRule

__all__ = ["LSQ", "PACT"]


@dataclass(frozen=True, repr=False)
class LSQ(Recipe):
    """The step size of every grid is learned with the weights.

    ``x_hat = s * clamp(round(x / s), low, high)``; the gradient to ``s`` is ``round(x / s) - x / s`` within the range
    and ``low`` or ``high`` outside, times ``1 / sqrt(N * high)``, ``N`` the numbers that share ``s``. Weights have
    ``low = -2**(n-1)`` and a step size an output channel (the paper: a layer), numbers after a ReLU ``low = 0``. Step
    sizes begin with ``2 * mean|x| / sqrt(high)``.

    Esser et al., 2020, "Learned Step Size Quantization". https://arxiv.org/abs/1902.08153
    With ``offset``: Bhalgat et al., 2020, "LSQ+: Improving low-bit quantization through learnable offsets and better
    initialization". https://arxiv.org/abs/2004.09576

    Example:
        >>> from lightning_light.quantization import Int8, Mixed
        >>> Mixed(default=LSQ(weights=4, activations=4), first=Int8(), last=Int8())
        Mixed(default=LSQ(), first=Int8(), last=Int8())

    Args:
        weights: bits, 2 to 8.
        activations: bits of what layers read, 2 to 8; None leaves it float.
        offset: activations learn an offset, too; their range begins with the least squared error.
        engine: as in `Recipe`.
        keep_float: as in `Recipe`.

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
    def rule(self) -> LayerRule:
        observer = MSE(share=0.1) if self.offset else StepSize()
        grid = grid_of(self.activations, observer, "step and offset" if self.offset else "step")
        return LayerRule(self._weight(self.weights, learned=True), grid)


@dataclass(frozen=True, repr=False)
class PACT(Recipe):
    """What comes out of a ReLU is cut off at ``a``, which is learned: ``x_hat = s * round(clamp(x, 0, a) / s)``.

    ``s = a / (2**n - 1)``; the gradient to ``a`` is 1 where ``x >= a``, else 0. The regularization of ``a`` that the
    paper asks for is the weight decay of its group in the optimizer. Tensors that can be below zero, such as the
    network's input, keep an observed range; weights are rounded as by `IntN` (the paper: as by DoReFa).

    Choi et al., 2018, "PACT: Parameterized Clipping Activation for Quantized Neural Networks".
    https://arxiv.org/abs/1805.06085

    Args:
        weights: bits, 2 to 8.
        activations: bits of what layers read, 2 to 8.
        engine: as in `Recipe`.
        keep_float: as in `Recipe`.

    Raises:
        ValueError: an argument out of range.
    """

    weights: int = 4
    activations: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self, self.weights, self.activations, may_be_float=False)

    @override
    def rule(self) -> LayerRule:
        return LayerRule(self._weight(self.weights), grid_of(self.activations, MovingAverage(share=0.1), "clip"))
