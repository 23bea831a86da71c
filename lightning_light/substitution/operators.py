"""Lighter operators that take the place of convolutions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_light.encoding import Extensible, decode, encode
from lightning_light.substitution.layers import ChannelPermutation, FireConv2d, GhostConv2d
from lightning_light.substitution.starts import (
    assign_balanced,
    channel_scales,
    fit_convolution,
    group_channels,
    input_covariance,
    representatives,
)
from lightning_light.surgery.plain_layers import convolution_like
from lightning_light.validation import OpenFraction, PositiveFloat, PositiveInt, validated

__all__ = [
    "DepthwiseSeparable",
    "Fire",
    "Ghost",
    "GroupShuffle",
    "InvertedResidual",
    "Operator",
    "operator_from",
    "plain_operator",
]


class Operator(Extensible, ABC):
    """A lighter operator: a frozen dataclass whose `build` makes layers with the shapes of a convolution.

    One of your own needs `build`; with `start` its training begins closer to the old layer. Its fields are stored in
    checkpoints: numbers, strings, booleans. Import the class before such a checkpoint is loaded.
    """

    def incompatibility(self, conv: nn.Conv2d) -> str | None:
        """Return why ``conv`` cannot be replaced, or None."""
        return None

    @abstractmethod
    def build(self, conv: nn.Conv2d) -> nn.Module:
        """Return new layers that map inputs of ``conv`` to tensors in the shape of its outputs.

        Args:
            conv: a convolution without groups. Only its attributes may be read, not its tensors: when a checkpoint is
                loaded they have no values.
        """

    def start(self, layers: nn.Module, conv: nn.Conv2d, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Set the tensors of ``layers``, as of `build`, to where their training begins; by default they stay.

        Args:
            layers: changed in place, in float32, without gradients.
            conv: the old layer, in float32.
            inputs: of the old layer, one per calibration batch, ``(samples, channels, height, width)``.
            outputs: of the old layer.
        """
        return


@validated
@dataclass(frozen=True)
class DepthwiseSeparable(Operator):
    """A depthwise convolution, then a pointwise one.

    Cost over that of the layer: ``multiplier * (1 / out_channels + 1 / kernel_elements)``. It starts from the best
    approximation of the kernels of each input channel by ``multiplier`` kernels, the singular value decomposition; then
    the pointwise convolution is fitted to the outputs of the layer by least squares.

    Guo et al., 2018, "Network Decoupling: From Regular to Depthwise Separable Convolutions".
    https://arxiv.org/abs/1808.05517

    Args:
        multiplier: depthwise kernels per input channel.

    Raises:
        ValueError: ``multiplier`` is below 1.
    """

    multiplier: PositiveInt = 1

    @override
    def incompatibility(self, conv: nn.Conv2d) -> str | None:
        most = min(math.prod(conv.kernel_size), conv.out_channels)
        return None if self.multiplier <= most else f"its kernels are sums of {most} at most"

    @override
    def build(self, conv: nn.Conv2d) -> nn.Module:
        width = self.multiplier * conv.in_channels
        depthwise = _like(conv, conv.in_channels, width, groups=conv.in_channels, bias=False)
        return nn.Sequential(depthwise, nn.Conv2d(width, conv.out_channels, 1, bias=conv.bias is not None))

    @override
    def start(self, layers: nn.Module, conv: nn.Conv2d, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        depthwise, pointwise = _convolutions(layers)
        scales = channel_scales(outputs)
        kernels = conv.weight.transpose(0, 1).flatten(2) / scales[:, None]  # (in, out, elements)
        left, values, right = torch.linalg.svd(kernels, full_matrices=False)
        roots = values[:, : self.multiplier].sqrt()
        depthwise.weight.copy_((right[:, : self.multiplier] * roots[:, :, None]).reshape(depthwise.weight.shape))
        columns = left[:, :, : self.multiplier] * roots[:, None] * scales[:, None]  # (in, out, multiplier)
        pointwise.weight.copy_(columns.transpose(0, 1).reshape(pointwise.weight.shape))
        fit_convolution(pointwise, [depthwise(x) for x in inputs], outputs)


@validated
@dataclass(frozen=True)
class GroupShuffle(Operator):
    """A grouped convolution between two permutations of channels.

    Cost over that of the layer: ``1 / groups``. The permutations put those inputs and outputs into a group that depend
    most on each other (as the learned groups of CondenseNet), then the weights are fitted to the outputs of the layer
    by least squares.

    Zhang et al., 2018, "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices".
    https://arxiv.org/abs/1707.01083
    Huang et al., 2018, "CondenseNet: An Efficient DenseNet using Learned Group Convolutions".
    https://arxiv.org/abs/1711.09224

    Args:
        groups: at least 2; layers whose channels it does not divide are left alone.

    Raises:
        ValueError: ``groups`` is below 2.
    """

    groups: PositiveInt = 2

    def __post_init__(self) -> None:
        if self.groups < 2:
            raise ValueError(f"`GroupShuffle(groups={self.groups})`: expected 2 groups or more. Write `groups=2`.")

    @override
    def incompatibility(self, conv: nn.Conv2d) -> str | None:
        if conv.in_channels % self.groups or conv.out_channels % self.groups:
            return f"{self.groups} groups do not divide {conv.in_channels} inputs and {conv.out_channels} outputs"
        return None

    @override
    def build(self, conv: nn.Conv2d) -> nn.Module:
        grouped = _like(conv, conv.in_channels, conv.out_channels, groups=self.groups, bias=conv.bias is not None)
        return nn.Sequential(ChannelPermutation(conv.in_channels), grouped, ChannelPermutation(conv.out_channels))

    @override
    def start(self, layers: nn.Module, conv: nn.Conv2d, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        before, after = (layer for layer in layers.children() if isinstance(layer, ChannelPermutation))
        (grouped,) = _convolutions(layers)
        energy = conv.weight.square().sum((2, 3)) * input_covariance(inputs).diagonal()
        of_output, of_input = group_channels(energy / channel_scales(outputs)[:, None].square(), self.groups)
        inner, order = of_input.argsort(stable=True), of_output.argsort(stable=True)
        before.index.copy_(inner)
        after.index.copy_(order.argsort())
        width = conv.in_channels // self.groups
        weight = torch.stack([conv.weight[o, inner[int(of_output[o]) * width :][:width]] for o in order])
        grouped.weight.copy_(weight)
        if grouped.bias is not None and conv.bias is not None:
            grouped.bias.copy_(conv.bias[order])
        fit_convolution(grouped, [before(x) for x in inputs], [y[:, order] for y in outputs])


@validated
@dataclass(frozen=True)
class Ghost(Operator):
    """Some channels by the convolution, the others from them by a cheap depthwise convolution.

    Cost over that of the layer: about ``1 / ratio``. The channels that predict the others best keep their kernels, and
    each of the others becomes the least-squares fit of one of them in a small neighbourhood.

    Han et al., 2020, "GhostNet: More Features from Cheap Operations". https://arxiv.org/abs/1911.11907. Differences:
    the order of channels is learned, and there is no batch norm or ReLU between the two convolutions, so that the old
    weights are a start.

    Args:
        ratio: outputs per kept channel, at least 2.
        kernel_size: of the depthwise convolution, odd.

    Raises:
        ValueError: ``ratio`` is below 2, or ``kernel_size`` is even.
    """

    ratio: PositiveInt = 2
    kernel_size: PositiveInt = 3

    def __post_init__(self) -> None:
        if self.ratio < 2 or self.kernel_size % 2 == 0:
            raise ValueError(
                f"`{self!r}`: expected `ratio` >= 2 and an odd `kernel_size`, found others. Write for instance "
                "`Ghost(ratio=2, kernel_size=3)`."
            )

    @override
    def incompatibility(self, conv: nn.Conv2d) -> str | None:
        return None if conv.out_channels >= self.ratio else f"it has {conv.out_channels} outputs"

    @override
    def build(self, conv: nn.Conv2d) -> nn.Module:
        kept, bias = -(-conv.out_channels // self.ratio), conv.bias is not None
        padding, made = self.kernel_size // 2, kept * (self.ratio - 1)
        cheap = nn.Conv2d(kept, made, self.kernel_size, padding=padding, groups=kept, bias=bias)
        return GhostConv2d(_like(conv, conv.in_channels, kept, bias=bias), cheap, conv.out_channels)

    @override
    def start(self, layers: nn.Module, conv: nn.Conv2d, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        assert isinstance(layers, GhostConv2d)  # of `build`
        rows = torch.cat([y.transpose(0, 1).flatten(1) for y in outputs], 1)
        correlation = torch.corrcoef(rows).nan_to_num(0.0)
        kept = representatives(correlation, layers.primary.out_channels)
        made = torch.tensor([o for o in range(conv.out_channels) if o not in set(kept.tolist())], device=rows.device)
        layers.primary.weight.copy_(conv.weight[kept])
        if layers.primary.bias is not None and conv.bias is not None:
            layers.primary.bias.copy_(conv.bias[kept])
        slots = assign_balanced(correlation[made][:, kept].abs(), self.ratio - 1) * (self.ratio - 1)
        slots = slots + torch.tensor([int((slots[:place] == slot).sum()) for place, slot in enumerate(slots)]).to(slots)
        layers.order.index[kept] = torch.arange(len(kept), device=rows.device)
        layers.order.index[made] = len(kept) + slots
        for parameter in layers.cheap.parameters():
            parameter.zero_()  # what damping pulls to
        wanted = [y.new_zeros(len(y), layers.cheap.out_channels, *y.shape[2:]) for y in outputs]
        for target, y in zip(wanted, outputs, strict=True):
            target[:, slots] = y[:, made]
        fit_convolution(layers.cheap, [y[:, kept] for y in outputs], wanted)


@validated
@dataclass(frozen=True)
class Fire(Operator):
    """Squeeze the input channels, then compute half of the outputs pointwise and the others by the old kernel size.

    Cost over that of the layer: about ``ratio * (1 + 1 / kernel_elements) / 2``, and the squeeze. It starts from the
    subspace of inputs that keeps most of the outputs (a singular value decomposition, weighted by the inputs'
    covariance); outputs with the least energy beside the centre of their kernels become pointwise; both convolutions
    are fitted to the outputs of the layer by least squares.

    Iandola et al., 2016, "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model size".
    https://arxiv.org/abs/1602.07360. Difference: no ReLU after the squeeze, so that the old weights are a start.

    Args:
        ratio: squeezed channels over input channels, in (0, 1].

    Raises:
        ValueError: unless ``0 < ratio <= 1``.
    """

    ratio: OpenFraction = 0.5

    @override
    def incompatibility(self, conv: nn.Conv2d) -> str | None:
        if conv.out_channels < 2:
            return "it has one output"
        return None if _is_centred(conv) else "its outputs are not at the positions of a 1x1 convolution"

    @override
    def build(self, conv: nn.Conv2d) -> nn.Module:
        width, bias = max(1, round(self.ratio * conv.in_channels)), conv.bias is not None
        points = conv.out_channels // 2
        return FireConv2d(
            nn.Conv2d(conv.in_channels, width, 1, bias=False),
            nn.Conv2d(width, points, 1, conv.stride, bias=bias),  # type: ignore[arg-type]  # pairs of integers
            _like(conv, width, conv.out_channels - points, bias=bias),
        )

    @override
    def start(self, layers: nn.Module, conv: nn.Conv2d, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        assert isinstance(layers, FireConv2d)  # of `build`
        width = layers.squeeze.out_channels
        scaled = conv.weight / channel_scales(outputs)[:, None, None, None]
        values, vectors = torch.linalg.eigh(input_covariance(inputs))
        roots = values.clamp_min(1e-6 * float(values.max()) or 1.0).sqrt()  # all are 0 for inputs of zeros
        rows = scaled.transpose(1, 3).flatten(0, 2) @ (vectors * roots)
        directions = torch.linalg.svd(rows.T @ rows)[0][:, :width].T
        squeeze, back = directions / roots @ vectors.T, vectors * roots @ directions.T
        layers.squeeze.weight.copy_(squeeze[:, :, None, None])
        middle = conv.weight[:, :, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2]
        beside = 1 - middle.square().sum(1) / conv.weight.square().sum((1, 2, 3)).clamp_min(1e-12)
        order = beside.argsort(stable=True)
        layers.order.index.copy_(order.argsort())
        squeezed = [layers.squeeze(x) for x in inputs]
        points = layers.pointwise.out_channels
        layers.pointwise.weight.copy_((middle @ back)[order[:points], :, None, None])
        layers.spatial.weight.copy_(torch.einsum("oihw,iq->oqhw", conv.weight[order[points:]], back))
        fit_convolution(layers.pointwise, squeezed, [y[:, order[:points]] for y in outputs])
        fit_convolution(layers.spatial, squeezed, [y[:, order[points:]] for y in outputs])


@validated
@dataclass(frozen=True)
class InvertedResidual(Operator):
    """A pointwise expansion, a depthwise convolution, and a pointwise projection.

    Batch norm and ReLU6 follow the first two. There is no start in closed form: the expansion is random, only the
    projection is fitted to the outputs of the layer by least squares. It depends on the fit most.

    Sandler et al., 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks". https://arxiv.org/abs/1801.04381.
    Difference: no skip connection. The output of a convolution is not near its input, and residual networks have
    theirs around it.

    Args:
        expansion: inner channels over input channels; at most about half of the kernel's elements saves cost.

    Raises:
        ValueError: ``expansion`` is not above 0.
    """

    expansion: PositiveFloat = 2.0

    @override
    def build(self, conv: nn.Conv2d) -> nn.Module:
        width = max(1, round(self.expansion * conv.in_channels))
        return nn.Sequential(
            nn.Conv2d(conv.in_channels, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU6(inplace=True),
            _like(conv, width, width, groups=width, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU6(inplace=True),
            nn.Conv2d(width, conv.out_channels, 1, bias=conv.bias is not None),
        )

    @override
    def start(self, layers: nn.Module, conv: nn.Conv2d, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        *inner, projection = layers.children()
        assert isinstance(projection, nn.Conv2d)  # of `build`
        hidden = list(inputs)
        for layer in inner:
            if isinstance(layer, nn.BatchNorm2d):
                _set_statistics(layer, hidden)
            hidden = [layer.eval()(x) for x in hidden]
        fit_convolution(projection, hidden, outputs)


def plain_operator(operator: Operator) -> list[Any]:
    """Return the name of the operator's class and its fields, for checkpoints.

    Example:
        >>> plain_operator(Ghost(ratio=4))
        ['lightning_light.substitution.operators.Ghost', {'ratio': 4, 'kernel_size': 3}]
    """
    options = encode(operator)
    return [options.pop("kind"), options]


def operator_from(plain: Sequence[Any]) -> Operator:
    """Return the operator that `plain_operator` has written.

    Raises:
        ManifestError: its class is not imported, or its fields are damaged.
    """
    name, options = plain
    found: Operator = decode(Operator, {**options, "kind": name}, "operators")
    return found


def _like(conv: nn.Conv2d, inputs: int, outputs: int, *, groups: int = 1, bias: bool) -> nn.Conv2d:
    """Return a convolution with other channels, and initial weights."""
    changes: dict[str, Any] = {"in_channels": inputs, "out_channels": outputs, "groups": groups, "bias": bias}
    layer: nn.Conv2d = convolution_like(conv, **changes, device=None)
    return layer


def _convolutions(layers: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in layers.children() if isinstance(layer, nn.Conv2d)]


def _is_centred(conv: nn.Conv2d) -> bool:
    """Check whether the middle of the kernel is at the positions of a 1x1 convolution without padding."""
    if conv.padding == "same":
        return all(size % 2 for size in conv.kernel_size)
    sizes = zip(conv.kernel_size, conv.padding, conv.dilation, strict=True)
    return conv.padding != "valid" and all(k % 2 and p == d * (k - 1) // 2 for k, p, d in sizes)


def _set_statistics(layer: nn.BatchNorm2d, inputs: Sequence[Tensor]) -> None:
    var, mean = torch.var_mean(torch.cat([x.transpose(0, 1).flatten(1) for x in inputs], 1), 1, correction=0)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(var)
