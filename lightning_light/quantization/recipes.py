"""Recipes: to how many bits weights and activations are quantized, and for whose kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Literal, TypeAlias

from torch import nn
from typing_extensions import override

from lightning_light.int8 import REDUCED_MAX
from lightning_light.quantization.observers import LSQObserver, MovingAverage, MSEObserver, Observer
from lightning_light.quantization.specs import ActivationSpec, LayerSpec, Learned, WeightSpec
from lightning_light.targets import Targets, as_targets
from lightning_light.validation import NonNegativeFloat, Range, validated

__all__ = ["LSQ", "PACT", "Binary", "Bits", "Engine", "Int8", "IntN", "MixedPrecision", "Recipe", "Ternary"]

Engine = Literal["qnnpack", "x86", "xnnpack", "onnx"]
Exclude = Targets | str | list[str] | None
Bits: TypeAlias = Annotated[int, Range(2, 8)]


@validated
@dataclass(frozen=True)
class Recipe(ABC):
    """How a network is quantized; a frozen value.

    Args:
        engine: whose int8 kernels will run it. ``qnnpack`` (ARM), ``xnnpack`` and ``onnx``: weights in [-127, 127].
            ``x86``: in [-63, 63], because without VNNI its kernels add two products in 16 bits, and 2 * 255 * 127 does
            not fit.
        exclude: layers that stay float: a pattern, several, or `Targets`, for instance ``Targets(types="Linear")``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range.
    """

    engine: Engine = field(default="qnnpack", kw_only=True)
    exclude: Exclude = field(default=None, kw_only=True)

    def __repr__(self) -> str:
        """The call that makes an equal recipe."""
        given = [(one.name, getattr(self, one.name)) for one in fields(self) if one.init]
        # The class has the defaults as attributes, except the empty dict of a `default_factory`.
        shown = (f"{name}={value!r}" for name, value in given if value != getattr(type(self), name, {}))
        return f"{type(self).__name__}({', '.join(shown)})"

    @abstractmethod
    def spec(self) -> LayerSpec:
        """Return how one layer is quantized."""

    def specs(self, model: nn.Module, layers: Sequence[str]) -> dict[str, LayerSpec]:
        """Return layer -> how it is quantized; a layer that is not in it stays float.

        Args:
            model: the network.
            layers: names of those with a weight, in the order in which they are called.
        """
        excluded = {} if self.exclude is None else as_targets(self.exclude).select(model)
        return {layer: self.spec() for layer in layers if layer not in excluded}

    def _weight(self, bits: int, *, learned: bool = False, per_channel: bool = True, top: int = 0) -> WeightSpec:
        top = top or (REDUCED_MAX if self.engine == "x86" and bits == 8 else 2 ** (bits - 1) - 1)
        # LSQ's range has one step more below zero than above; that of int8 kernels has not.
        return WeightSpec(bits, -top - (learned and bits < 8), top, per_channel=per_channel, learned=learned)


@validated
@dataclass(frozen=True, repr=False)
class Int8(Recipe):
    """Quantize to eight bits, as the int8 kernels of mobile and server CPUs do.

    Weights are symmetric, one scale per output channel: ``q = round(w / s)`` in [-127, 127], ``s = max|w| / 127``; zero
    stays zero, so masks survive. Activations are affine, one scale per tensor: ``q = round(x / s) + z`` in [0, 255],
    with ``s`` and ``z`` from the range that the observer finds.

    Jacob et al., 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference".
    https://arxiv.org/abs/1712.05877

    Example:
        >>> Int8(engine="x86", exclude=["head"])
        Int8(engine='x86', exclude=['head'])

    Args:
        engine: as in `Recipe`.
        exclude: as in `Recipe`.
        observer: how the range of each tensor is found.
        per_channel: False for one scale per layer, which keeps the number of distinct values of a clustered weight.
        reduce_range: quantize weights to [-63, 63]; None: only for ``engine="x86"``. With True, ONNX Runtime is exact
            on x86 without VNNI too. With False, the kernels of x86 are exact with VNNI only; weights of grouped
            convolutions stay reduced for them.

    Raises:
        ValueError: an argument out of range.
    """

    engine: Engine = "qnnpack"
    exclude: Exclude = None
    observer: Observer = MovingAverage()
    per_channel: bool = field(default=True, kw_only=True)
    reduce_range: bool | None = field(default=None, kw_only=True)

    @override
    def spec(self) -> LayerSpec:
        top = {None: 0, True: REDUCED_MAX, False: 127}[self.reduce_range]
        return LayerSpec(self._weight(8, per_channel=self.per_channel, top=top), ActivationSpec(observer=self.observer))


@validated
@dataclass(frozen=True, repr=False)
class IntN(Recipe):
    """Quantize to any number of bits, with ranges from the values themselves.

    Weights are symmetric, in ``[-(2**(n-1) - 1), 2**(n-1) - 1]`` with ``s = max|w| / (2**(n-1) - 1)``; activations
    affine, in ``[0, 2**n - 1]``. With eight bits for activations, weights of fewer bits run on int8 kernels (a byte
    each); no runtime here has a kernel for activations of fewer bits. Below four bits `LSQ` is the better choice: a
    range that holds the largest weight leaves the others too few steps.

    Krishnamoorthi, 2018, "Quantizing deep convolutional networks for efficient inference: A whitepaper".
    https://arxiv.org/abs/1806.08342

    Example:
        >>> IntN(weights=4, activations=None)
        IntN(activations=None)

    Args:
        weights: bits, 2 to 8.
        activations: bits of what layers read, 2 to 8; None: only the weights are quantized.
        observer: how the range of each tensor is found; ``DynamicObserver()`` for dynamic quantization.
        per_channel: False for one scale per layer.
        engine: as in `Recipe`.
        exclude: as in `Recipe`.

    Raises:
        ValueError: an argument out of range.
    """

    weights: Bits = 4
    activations: Bits | None = 8
    observer: Observer = MovingAverage()
    per_channel: bool = field(default=True, kw_only=True)

    @override
    def spec(self) -> LayerSpec:
        weight = self._weight(self.weights, per_channel=self.per_channel)
        return LayerSpec(weight, _activation(self.activations, self.observer))


@validated
@dataclass(frozen=True, repr=False)
class Ternary(Recipe):
    """Quantize weights to -s, 0 and s: ``q = sign(w)`` where ``|w| > 0.7 * mean|w|``, ``s`` the mean ``|w|`` of those.

    Each output channel has its own threshold and scale; the paper has one of each per layer.

    Li et al., 2016, "Ternary Weight Networks". https://arxiv.org/abs/1605.04711

    Args:
        activations: bits of what layers read; None leaves it float, as the paper does.
        observer: how the range of each tensor is found.
        engine: as in `Recipe`.
        exclude: as in `Recipe`.

    Raises:
        ValueError: an argument out of range.
    """

    activations: Bits | None = 8
    observer: Observer = MovingAverage()

    @override
    def spec(self) -> LayerSpec:
        return LayerSpec(WeightSpec(2, -1, 1, "ternary"), _activation(self.activations, self.observer))


@validated
@dataclass(frozen=True, repr=False)
class Binary(Recipe):
    """Quantize weights to -s and s: ``sign(w) * mean|w|``, one mean per output channel; masked weights stay zero.

    The gradient passes where ``|w| <= 1``. The paper multiplies it by ``s`` besides, and adds one part in ``n``.

    Rastegari et al., 2016, "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks", section 3.1.
    https://arxiv.org/abs/1603.05279

    Args:
        activations: bits of what layers read; None leaves it float, as the paper's "Binary-Weight-Networks" do.
        observer: how the range of each tensor is found.
        engine: as in `Recipe`.
        exclude: as in `Recipe`.

    Raises:
        ValueError: an argument out of range.
    """

    activations: Bits | None = 8
    observer: Observer = MovingAverage()

    @override
    def spec(self) -> LayerSpec:
        return LayerSpec(WeightSpec(1, -1, 1, "binary"), _activation(self.activations, self.observer))


@validated
@dataclass(frozen=True, repr=False)
class LSQ(Recipe):
    """Learn the scale of every weight and activation along with the weights (learned step size quantization).

    ``x_hat = s * clamp(round(x / s), low, top)``; the gradient to ``s`` is ``round(x / s) - x / s`` within the range
    and ``low`` or ``top`` outside, times ``1 / sqrt(N * top)``, ``N`` the number of values that share ``s``. Weights
    have ``low = -2**(n-1)`` and a scale per output channel (the paper: per layer), activations after a ReLU
    ``low = 0``. Scales of weights begin with ``2 * mean|w| / sqrt(top)``, those of activations with the smallest
    squared error, as in LSQ+, which is closer to the float network than the start of the paper.

    With few bits, weights near the threshold between two quantized values oscillate from step to step, which disturbs
    the statistics of batch norms. ``dampening`` adds ``weight * sum((w_hat - clamp(w, s * low, s * top)) ** 2)`` to the
    loss of every layer, with ``w_hat`` as a constant; its weight grows from 0 to ``dampening`` over the training with
    fake quantization, as half a cosine. A weight that a parametrization computes is left alone.

    Esser et al., 2020, "Learned Step Size Quantization". https://arxiv.org/abs/1902.08153
    With ``offset``: Bhalgat et al., 2020, "LSQ+: Improving low-bit quantization through learnable offsets and better
    initialization". https://arxiv.org/abs/2004.09576
    With ``dampening``: Nagel et al., 2022, "Overcoming Oscillations in Quantization-Aware Training", section 4.2.
    https://arxiv.org/abs/2203.11086

    Example:
        >>> from lightning_light.quantization import Int8, MixedPrecision
        >>> MixedPrecision(default=LSQ(weights=4, activations=4), first=Int8(), last=Int8())
        MixedPrecision(default=LSQ(), first=Int8(), last=Int8())

    Args:
        weights: bits, 2 to 8.
        activations: bits of what layers read, 2 to 8; None leaves it float.
        offset: activations learn an offset too; their range begins with the smallest squared error.
        dampening: weight of the penalty at the end of training; 0.0 for none.
        engine: as in `Recipe`.
        exclude: as in `Recipe`.

    Raises:
        ValueError: an argument out of range.
    """

    weights: Bits = 4
    activations: Bits | None = 4
    offset: bool = False
    dampening: NonNegativeFloat = field(default=0.0, kw_only=True)

    @override
    def spec(self) -> LayerSpec:
        observer = MSEObserver(momentum=0.1) if self.offset else LSQObserver()
        activation = _activation(self.activations, observer, "scale and offset" if self.offset else "scale")
        weight = replace(self._weight(self.weights, learned=True), dampening=self.dampening)
        return LayerSpec(weight, activation)


@validated
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

    weights: Bits = 4
    activations: Bits = 4

    @override
    def spec(self) -> LayerSpec:
        return LayerSpec(self._weight(self.weights), _activation(self.activations, MovingAverage(momentum=0.1), "clip"))


@validated
@dataclass(frozen=True, repr=False)
class MixedPrecision(Recipe):
    """Quantize layers by recipes of their own: by name, or the first and the last one.

    The first pattern of ``layers`` that names a layer decides; ``first`` and ``last`` go before all of them.

    Example:
        >>> from lightning_light.quantization import Int8, IntN
        >>> MixedPrecision({"layer1.*": Int8()}, default=IntN(weights=6))
        MixedPrecision(layers={'layer1.*': Int8()}, default=IntN(weights=6))

    Args:
        layers: pattern, as in `Targets` -> recipe.
        default: of the other layers.
        first: of the layer that is called first.
        last: of the layer that is called last.
        exclude: layers that stay float; the parts have none of their own.

    Raises:
        ValueError: a part has ``exclude``, is mixed itself, or is for another engine than the others.
        TypeError: a part is not a recipe.
    """

    layers: Mapping[str, Recipe] = field(default_factory=dict)
    default: Recipe = Int8()
    first: Recipe | None = None
    last: Recipe | None = None
    engine: Engine = field(default="qnnpack", init=False)

    def __post_init__(self) -> None:
        parts = [*self.layers.values(), self.default, *filter(None, (self.first, self.last))]
        for part in parts:
            if isinstance(part, MixedPrecision) or part.exclude is not None:
                raise ValueError(
                    f"`MixedPrecision(...)` with {part!r}: expected recipes that are neither mixed nor exclude layers "
                    "themselves. Write `MixedPrecision(..., exclude=...)`."
                )
        engines = sorted({part.engine for part in parts})
        if len(engines) > 1:
            raise ValueError(
                f"`MixedPrecision(...)`: expected recipes for one engine, found {engines}. Give all parts "
                "the same `engine=`."
            )
        object.__setattr__(self, "engine", engines[0])

    @override
    def spec(self) -> LayerSpec:
        return self.default.spec()

    @override
    def specs(self, model: nn.Module, layers: Sequence[str]) -> dict[str, LayerSpec]:
        found = super().specs(model, layers)
        for pattern, recipe in reversed(list(self.layers.items())):
            named = as_targets(pattern).select(model)
            found |= {layer: recipe.spec() for layer in layers if layer in named and layer in found}
        ends = [(layers[-1], self.last), (layers[0], self.first)] if layers else []
        return found | {layer: end.spec() for layer, end in ends if end is not None and layer in found}


def _activation(bits: int | None, observer: Observer, learned: Learned = "") -> ActivationSpec | None:
    """How what layers read is quantized to ``bits``; None leaves it float."""
    return None if bits is None else ActivationSpec(bits=bits, observer=observer, learned=learned)
