"""Forms of expansion: which branches a convolution gets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import nn
from typing_extensions import override

from lightning_light.reparameterization.branches import Spec
from lightning_light.validation import PositiveInt, validated

__all__ = ["ACB", "DBB", "OREPA", "Branches", "Form", "RepVGG"]


class Form(ABC):
    """Which branches a convolution gets beside itself.

    A form of your own is one frozen dataclass with `branches`.
    """

    @abstractmethod
    def branches(self, conv: nn.Conv2d) -> list[Spec]:
        """Return the kind and the kernel size of every branch.

        Branches of layers, each with a batch norm at its end: ``"conv"``, ``"identity"`` (for as many outputs as
        inputs, without a stride), ``"conv_conv"`` (1x1, then the kernel), ``"conv_pool"`` (1x1, then an average over
        the kernel, without dilation), ``"pool"``. Or branches of kernels, which are scaled and added before the one
        convolution: ``"kernel"``, ``"kernel_separable"`` (depthwise, then 1x1), ``"kernel_average"``.
        Empty where the form has none for this convolution.
        """


@validated
@dataclass(frozen=True)
class ACB(Form):
    """Asymmetric convolution block: 1xk and kx1 beside kxk.

    Ding et al., 2019, "ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric Convolution Blocks".
    https://arxiv.org/abs/1908.03930
    """

    @override
    def branches(self, conv: nn.Conv2d) -> list[Spec]:
        height, width = conv.kernel_size
        return [("conv", 1, width), ("conv", height, 1)] if min(height, width) > 1 else []


@validated
@dataclass(frozen=True)
class RepVGG(Form):
    """1x1 beside kxk, and the identity where the shapes allow it.

    Ding et al., 2021, "RepVGG: Making VGG-style ConvNets Great Again". https://arxiv.org/abs/2101.03697
    """

    @override
    def branches(self, conv: nn.Conv2d) -> list[Spec]:
        return [("conv", 1, 1), *_identity(conv)] if max(conv.kernel_size) > 1 else []


@validated
@dataclass(frozen=True)
class Branches(Form):
    """The same kernel ``n`` times, 1x1 beside a larger one, and the identity where the shapes allow it.

    Vasu et al., 2023, "MobileOne: An Improved One millisecond Mobile Backbone". https://arxiv.org/abs/2206.04040

    Args:
        n: convolutions of the full kernel, the expanded one included.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
    """

    n: PositiveInt = 4

    @override
    def branches(self, conv: nn.Conv2d) -> list[Spec]:
        height, width = conv.kernel_size
        pointwise: list[Spec] = [("conv", 1, 1)] if max(height, width) > 1 else []
        return [*[("conv", height, width)] * (self.n - 1), *pointwise, *_identity(conv)]


@validated
@dataclass(frozen=True)
class DBB(Form):
    """Diverse branch block: 1x1, 1x1 then kxk, and 1x1 then an average over kxk, beside kxk.

    A depthwise convolution averages without the 1x1, and one with dilation has no average.

    Ding et al., 2021, "Diverse Branch Block: Building a Convolution as an Inception-like Unit".
    https://arxiv.org/abs/2103.13425
    """

    @override
    def branches(self, conv: nn.Conv2d) -> list[Spec]:
        height, width = conv.kernel_size
        if max(height, width) == 1:
            return []
        depthwise = conv.groups == conv.in_channels == conv.out_channels
        average: list[Spec] = [("pool" if depthwise else "conv_pool", height, width)]
        return [("conv", 1, 1), ("conv_conv", height, width), *(average if max(conv.dilation) == 1 else [])]


@validated
@dataclass(frozen=True)
class OREPA(Form):
    """Online re-parameterization: 1x1, depthwise then 1x1, and 1x1 then an average, added before one convolution.

    Each has a learned scale per output channel in place of a batch norm. The input passes one convolution, so a step
    takes little longer than without branches.

    Hu et al., 2022, "Online Convolutional Re-parameterization". https://arxiv.org/abs/2204.00826
    """

    @override
    def branches(self, conv: nn.Conv2d) -> list[Spec]:
        height, width = conv.kernel_size
        if max(height, width) == 1:
            return []
        return [("kernel", 1, 1), ("kernel_separable", height, width), ("kernel_average", height, width)]


def _identity(conv: nn.Conv2d) -> list[Spec]:
    fits = conv.in_channels == conv.out_channels and max(conv.stride) == 1
    return [("identity", 1, 1)] if fits else []
