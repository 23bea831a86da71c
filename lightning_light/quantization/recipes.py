"""Recipes: how many bits, for what, and by whose rules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, get_args

from torch import nn
from typing_extensions import override

from lightning_light.quantization.observers import MovingAverage, Observer
from lightning_light.quantization.rules import Grid, LayerRule, Learned, WeightRule
from lightning_light.targets import Targets, as_targets

__all__ = ["Binary", "Engine", "Int8", "IntN", "Recipe", "Ternary", "check_bits", "grid_of"]

Engine = Literal["qnnpack", "x86", "xnnpack", "onnx"]
KeepFloat = Targets | str | list[str] | None

_WEIGHT_LIMIT = {"x86": 63}


@dataclass(frozen=True)
class Recipe(ABC):
    """What is rounded to how many bits; a frozen value.

    Args:
        engine: whose rules the layers follow that an int8 kernel computes. ``qnnpack`` (ARM), ``xnnpack`` and ``onnx``:
            weights in [-127, 127]. ``x86``: in [-63, 63], because without VNNI its kernels add two products in 16
            bits, and 2 * 255 * 127 does not fit.
        keep_float: layers that stay float: patterns or `Targets`.

    Raises:
        ValueError: an argument out of range.
        TypeError: ``observer`` of a subclass is none.
    """

    engine: Engine = field(default="qnnpack", kw_only=True)
    keep_float: KeepFloat = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.engine not in get_args(Engine):
            raise ValueError(
                f"`{type(self).__name__}(engine={self.engine!r})`: expected one of {list(get_args(Engine))}. For "
                "phones write 'qnnpack'."
            )
        observer = getattr(self, "observer", None)
        if observer is not None and not isinstance(observer, Observer):
            raise TypeError(
                f"`{type(self).__name__}(observer={observer!r})`: expected an observer, found "
                f"{type(observer).__name__}. Write `observer=MSE()`, for instance."
            )

    def __repr__(self) -> str:
        """The call that makes an equal recipe."""
        given = [(one.name, getattr(self, one.name), _usual(one)) for one in fields(self) if one.init]
        return (
            f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value, usual in given if value != usual)})"
        )

    @abstractmethod
    def rule(self) -> LayerRule:
        """What is rounded in one layer."""

    def rules(self, model: nn.Module, layers: Sequence[str]) -> dict[str, LayerRule]:
        """Layer -> its rule; a layer that is not in it stays float.

        Args:
            model: the network.
            layers: names of those with a weight, in the order in which they are called.
        """
        kept = {} if self.keep_float is None else as_targets(self.keep_float).select(model)
        return {layer: self.rule() for layer in layers if layer not in kept}

    def _weight(self, bits: int, *, learned: bool = False, per_channel: bool = True) -> WeightRule:
        high = 2 ** (bits - 1) - 1
        if bits == 8:
            high = _WEIGHT_LIMIT.get(self.engine, high)
        # LSQ's grid has one step more below zero than above; the kernels' of eight bits has not.
        return WeightRule(bits, -high - (learned and bits < 8), high, per_channel=per_channel, learned=learned)


@dataclass(frozen=True, repr=False)
class Int8(Recipe):
    """Eight bits as the int8 kernels of mobile and server CPUs compute with them.

    Weights are symmetric, one scale an output channel: ``q = round(w / s)`` in [-127, 127], ``s = max|w| / 127``; zero
    stays zero, so masks survive. Activations are affine, one scale a tensor: ``q = round(x / s) + z`` in [0, 255],
    with ``s`` and ``z`` from the range that the observer has found.

    Jacob et al., 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference".
    https://arxiv.org/abs/1712.05877

    Example:
        >>> Int8(engine="x86", keep_float=["head"])
        Int8(engine='x86', keep_float=['head'])

    Args:
        engine: as in `Recipe`.
        keep_float: as in `Recipe`.
        observer: how the range of each tensor is found.
        per_channel: False for one scale a layer, which leaves a clustered weight as many distinct values as it has.

    Raises:
        ValueError: an argument out of range.
    """

    engine: Engine = "qnnpack"
    keep_float: KeepFloat = None
    observer: Observer = MovingAverage()
    per_channel: bool = field(default=True, kw_only=True)

    @override
    def rule(self) -> LayerRule:
        return LayerRule(self._weight(8, per_channel=self.per_channel), Grid(observer=self.observer))


@dataclass(frozen=True, repr=False)
class IntN(Recipe):
    """Any number of bits, with ranges from the numbers themselves.

    Weights are symmetric, in ``[-(2**(n-1) - 1), 2**(n-1) - 1]`` with ``s = max|w| / (2**(n-1) - 1)``; activations
    affine, in ``[0, 2**n - 1]``. With eight bits for activations, weights of fewer bits run on int8 kernels (a byte
    each); what reads fewer bits is trained as it will compute, and no runtime here has a kernel for it. Below four
    bits `LSQ` is the better choice: a range that holds the largest weight leaves the others too few steps.

    Krishnamoorthi, 2018, "Quantizing deep convolutional networks for efficient inference: A whitepaper".
    https://arxiv.org/abs/1806.08342

    Example:
        >>> IntN(weights=4, activations=None)
        IntN(activations=None)

    Args:
        weights: bits, 2 to 8.
        activations: bits of what layers read, 2 to 8; None leaves it float: the weights alone are rounded.
        observer: how the range of each tensor is found; ``AtRunTime()`` for dynamic quantization.
        per_channel: False for one scale a layer.
        engine: as in `Recipe`.
        keep_float: as in `Recipe`.

    Raises:
        ValueError: an argument out of range.
    """

    weights: int = 4
    activations: int | None = 8
    observer: Observer = MovingAverage()
    per_channel: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self, self.weights, self.activations)

    @override
    def rule(self) -> LayerRule:
        return LayerRule(
            self._weight(self.weights, per_channel=self.per_channel), grid_of(self.activations, self.observer)
        )


@dataclass(frozen=True, repr=False)
class Ternary(Recipe):
    """Weights of -s, 0 and s: ``q = sign(w)`` where ``|w| > 0.7 * mean|w|``, ``s`` the mean ``|w|`` of those.

    Each output channel has its own threshold and scale; the paper has one of each a layer.

    Li et al., 2016, "Ternary Weight Networks". https://arxiv.org/abs/1605.04711

    Args:
        activations: bits of what layers read; None leaves it float, as the paper does.
        observer: how the range of each tensor is found.
        engine: as in `Recipe`.
        keep_float: as in `Recipe`.

    Raises:
        ValueError: an argument out of range.
    """

    activations: int | None = 8
    observer: Observer = MovingAverage()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self, 2, self.activations)

    @override
    def rule(self) -> LayerRule:
        return LayerRule(WeightRule(2, -1, 1, "ternary"), grid_of(self.activations, self.observer))


@dataclass(frozen=True, repr=False)
class Binary(Recipe):
    """Weights of -s and s: ``sign(w) * mean|w|``, one mean an output channel; what a mask has made zero stays zero.

    The gradient passes where ``|w| <= 1``. The paper multiplies it by ``s`` besides, and adds one part in ``n``.

    Rastegari et al., 2016, "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks", section 3.1.
    https://arxiv.org/abs/1603.05279

    Args:
        activations: bits of what layers read; None leaves it float, as the paper's "Binary-Weight-Networks" do.
        observer: how the range of each tensor is found.
        engine: as in `Recipe`.
        keep_float: as in `Recipe`.

    Raises:
        ValueError: an argument out of range.
    """

    activations: int | None = 8
    observer: Observer = MovingAverage()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self, 2, self.activations)

    @override
    def rule(self) -> LayerRule:
        return LayerRule(WeightRule(1, -1, 1, "binary"), grid_of(self.activations, self.observer))


def _usual(one: Field[Any]) -> Any:
    return one.default if one.default_factory is MISSING else one.default_factory()


def grid_of(bits: int | None, observer: Observer, learned: Learned = "") -> Grid | None:
    """What layers read, in ``bits``."""
    return None if bits is None else Grid(bits=bits, observer=observer, learned=learned)


def check_bits(recipe: Recipe, weights: int, activations: int | None, *, may_be_float: bool = True) -> None:
    """Refuse what is no width; ``activations`` of None leaves them float, if they ``may_be_float``.

    Raises:
        ValueError: not an integer in [2, 8].
    """
    cure = "; to leave activations float, `activations=None`" if may_be_float else ""
    for name, bits in (("weights", weights), ("activations", activations)):
        if bits is None and name == "activations" and may_be_float:
            continue
        if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 8:
            raise ValueError(
                f"`{type(recipe).__name__}({name}={bits!r})`: expected an integer number of bits in [2, 8]. For one "
                f"bit write `Binary()`{cure}."
            )
