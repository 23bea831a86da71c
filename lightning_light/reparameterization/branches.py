"""Convolutions of parallel branches, and the algebra that merges them into one convolution.

A kernel of ``(kh, kw)`` is placed in the middle of one of ``(KH, KW)``, at ``((KH - kh) // 2, (KW - kw) // 2)``. What a
branch of several layers needs around the borders is padded before its first layer, so that a batch norm inside maps
the padding as it maps any other zero, and the merged convolution is exact at the borders.

Branches are layers, whose outputs are added (`BranchedConv2d`), or kernels, which are added before one convolution
(`OnlineConv2d`). In training, the former are also run as one convolution, with the kernel into which the statistics of
the batch merge them.
"""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from math import prod
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import override

from lightning_light.batch_norm import scale_and_shift
from lightning_light.copies import copy_network
from lightning_light.errors import UnsupportedError
from lightning_light.merging import BranchedLayer
from lightning_light.reparameterization.batch_statistics import FeatureMap, grouped_product, keep_statistics
from lightning_light.surgery.effective import EffectiveLayer
from lightning_light.surgery.plain_layers import POINTWISE, convolution_like

__all__ = [
    "Branch",
    "BranchedConv2d",
    "ExpandedConv2d",
    "KernelBranch",
    "OnlineConv2d",
    "Spec",
    "expand",
    "is_replaced",
]

Spec: TypeAlias = tuple[str, int, int]
"""Kind of a branch, and the height and width of its kernel."""

_OF_CONVOLUTION = {*nn.Conv2d.__constants__, "transposed"}
_LAYERS = (nn.Conv2d, nn.BatchNorm2d, nn.AvgPool2d)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GAIN = 5**0.5  # of torch's own convolutions

Pads: TypeAlias = tuple[tuple[int, int], tuple[int, int]]
"""What is padded before and after, for height and width; negative where the input is cropped."""


class ExpandedConv2d(EffectiveLayer, BranchedLayer):
    """A convolution with branches, of either kind.

    ``weight`` and ``bias`` are those of the merged convolution, and read-only.

    Attributes:
        main: the convolution that was expanded, whose weight stays after merging.
        branches: see the subclasses.
    """

    def __init__(self, main: nn.Conv2d, branches: Iterable[nn.Module]) -> None:
        super().__init__()
        self.main: nn.Conv2d = main
        self.branches = nn.ModuleList(branches)

    @override
    def read(self, name: str) -> Any:
        return getattr(self.main, name) if name in _OF_CONVOLUTION else super().read(name)

    @abstractmethod
    def kernel_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """Return the kernel and the bias of the merged convolution, in evaluation mode, on the CPU."""

    def parts(self) -> list[nn.Module]:
        """Return the layers that a forward pass calls."""
        return [self.main]

    def unfilled(self) -> nn.Conv2d:
        """Return the convolution that takes the place of this layer, made of its parameter objects.

        The values are still the old ones. The gradients of the objects are those of the merged weight and bias, so the
        state that an optimizer keeps for them stays right.
        """
        return _plain_layer(self.main, self.main.weight).train(self.training)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator, scale: float) -> None:
        """Give the branches, on ``meta`` so far, tensors beside those of `main`.

        Args:
            generator: draws their kernels.
            scale: of every branch, for all output channels.
        """
        self.branches.to_empty(device="cpu")
        for module in self.branches.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
        for parameter in self.branches.parameters():
            if parameter.dim() == 4:
                nn.init.kaiming_uniform_(parameter, a=_GAIN, generator=generator)
        for branch in cast("Iterable[Branch | KernelBranch]", self.branches):
            branch.scale.fill_(scale)
        self.branches.to(device=self.main.weight.device, dtype=self.main.weight.dtype)

    @override
    def fuse(self) -> nn.Conv2d:
        kernel, bias = self.kernel_and_bias()
        weight = self.main.weight
        fused = _plain_layer(self.main, nn.Parameter(torch.empty_like(weight), weight.requires_grad))
        fused.bias = None if bias is None else nn.Parameter(weight.new_empty(len(bias)), weight.requires_grad)
        with torch.no_grad():
            fused.weight.copy_(kernel)
            if fused.bias is not None and bias is not None:
                fused.bias.copy_(bias)
        return fused.train(self.training)


class Branch(nn.Module):
    """One branch: padding, then layers that end with a batch norm.

    Attributes:
        pads: in the order of `torch.nn.functional.pad`; empty where the layers pad themselves.
        layers: convolutions, batch norms and average poolings, in order.
    """

    def __init__(self, layers: Iterable[nn.Module], pads: Pads | None = None) -> None:
        super().__init__()
        self.pads = () if pads is None or not any(map(any, pads)) else (*pads[1], *pads[0])
        self.layers = nn.Sequential(*layers)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layers(F.pad(x, self.pads) if self.pads else x))

    @property
    def norm(self) -> nn.BatchNorm2d:
        """The last batch norm, whose weight scales the branch."""
        return cast(nn.BatchNorm2d, self.layers[-1])

    @property
    def scale(self) -> nn.Parameter:
        """The weight of the last batch norm."""
        return self.norm.weight

    def kernel_and_bias(self, inputs: int, groups: int) -> tuple[Tensor, Tensor]:
        """Return the kernel ``(out, in / groups, kh, kw)`` and the bias of the branch, in float64 on the CPU."""
        with torch.no_grad():
            return copy_network(self).cpu().double().eval().merged(inputs, groups)

    def merged(self, inputs: int, groups: int, x: FeatureMap | None = None) -> tuple[Tensor, Tensor]:
        """Return the kernel ``(out, in / groups, kh, kw)`` and the bias of the branch, at least in float32.

        Args:
            inputs: channels of the input.
            groups: of the convolutions.
            x: the input, whose statistics batch norms in training mode use and keep.
        """
        x = x and x.padded(self.pads)
        first, like = self.layers[0], self.norm.bias
        bias = torch.zeros((), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        if isinstance(first, nn.Conv2d):
            kernel = first.weight.to(bias.dtype)
        else:
            kernel = torch.eye(inputs // groups).to(bias).repeat(groups, 1)[..., None, None]
        for layer in self.layers:
            if isinstance(layer, nn.BatchNorm2d):
                kernel, bias = _normalized(layer, kernel, bias, x)
                continue
            if isinstance(layer, nn.AvgPool2d):
                size = cast("tuple[int, int]", layer.kernel_size)
                kernel = kernel.expand(-1, -1, *size) / prod(size)
            elif isinstance(layer, nn.Conv2d) and layer is not first:
                own = layer.weight.to(bias.dtype)
                bias = grouped_product(own.sum((2, 3)), bias[:, None], groups)[:, 0]
                kernel = _in_sequence(kernel, own, groups)
            x = x and x.behind(layer, kernel)
        return kernel, bias


class BranchedConv2d(ExpandedConv2d):
    """A convolution and branches beside it, whose outputs are added.

    ``weight`` and ``bias`` have no gradient; in training mode, where the batch norms of the branches use the statistics
    of the batch, their values are refused.

    Attributes:
        branches: of class `Branch`.
    """

    @override
    def forward(self, x: Tensor) -> Tensor:
        compiling = torch.compiler.is_compiling()  # a compiler fuses the batch norms of the layers
        if self.training and not compiling and not any(map(_is_observed, self.parts())):
            return self._merged_by_batch(x)
        output = self.main(x)
        for branch in self.branches:
            output = output + branch(x)
        return cast(Tensor, output)

    @override
    def parts(self) -> list[nn.Module]:
        branches = (branch.layers if isinstance(branch, Branch) else [branch] for branch in self.branches)
        return [*super().parts(), *chain.from_iterable(branches)]

    def _merged_by_batch(self, x: Tensor) -> Tensor:
        """Run one convolution with the sum of all kernels, each normalized by the statistics of this batch."""
        main, device = self.main, x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            values = FeatureMap(x, main.groups)
            branches = cast(Iterable[Branch], self.branches)
            merged = (branch.merged(main.in_channels, main.groups, values) for branch in branches)
            kernel, bias = _summed(main.weight, main.bias, merged)
            return cast(Tensor, main._conv_forward(x, kernel.to(x.dtype), bias.to(x.dtype)))

    @override
    def effective(self, name: str) -> tuple[Callable[[], Tensor], Sequence[int], Tensor]:
        weight = self.main.weight.detach()
        shape = weight.shape if name == "weight" else weight.shape[:1]
        return lambda: self._merged(name).to(weight), shape, weight

    def _merged(self, name: str) -> Tensor:
        if self.training:
            raise UnsupportedError(
                f"`{type(self).__name__}.{name}` in training mode: expected code that calls the layer, or reads the "
                f"shape and type of its {name}, found code that computes with it. The branches of the layer have no "
                "common weight in training, where batch norms use the statistics of the batch. Exclude the layer from "
                "`targets`."
            )
        return self.kernel_and_bias()[name == "bias"]

    @override
    def kernel_and_bias(self) -> tuple[Tensor, Tensor]:
        main, branches = self.main, cast(Iterable[Branch], self.branches)
        merged = (branch.kernel_and_bias(main.in_channels, main.groups) for branch in branches)
        return _summed(_float64(main.weight), None if main.bias is None else _float64(main.bias), merged)

    @override
    def unfilled(self) -> nn.Conv2d:
        layer = super().unfilled()
        if layer.bias is None:
            layer.bias = cast(Branch, self.branches[0]).norm.bias
        return layer


class KernelBranch(nn.Module):
    """One kernel that is added to that of a convolution, times a scale.

    Attributes:
        size: of the whole kernel.
        averages: whether a 1x1 weight is spread over the kernel, as an average of the outputs does.
        weight: ``(out, in / groups, kh, kw)``.
        depthwise: ``(1, in / groups, kh, kw)``, the kernels behind which a 1x1 ``weight`` stands, or None.
        scale: ``(out,)``.
    """

    def __init__(self, conv: nn.Conv2d, kind: str, height: int, width: int) -> None:
        super().__init__()
        within = conv.in_channels // conv.groups
        own = (height, width) if kind == "kernel" else (1, 1)
        self.size: tuple[int, ...] = tuple(conv.kernel_size)
        self.averages = kind == "kernel_average"
        self.weight = nn.Parameter(torch.empty(conv.out_channels, within, *own, device="meta"))
        self.depthwise: nn.Parameter | None = None
        if kind == "kernel_separable":
            self.depthwise = nn.Parameter(torch.empty(1, within, height, width, device="meta"))
        self.scale = nn.Parameter(torch.empty(conv.out_channels, device="meta"))

    @override
    def forward(self) -> Tensor:
        kernel = self.weight if self.depthwise is None else self.weight * self.depthwise
        if self.averages:
            kernel = kernel.expand(-1, -1, *self.size) / (self.size[0] * self.size[1])
        return _placed(kernel, self.size) * self.scale[:, None, None, None]


class OnlineConv2d(ExpandedConv2d):
    """A convolution with the sum of its own kernel and those of its branches.

    Attributes:
        branches: of class `KernelBranch`.
    """

    @override
    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.main._conv_forward(x, self._kernel(), self.main.bias))

    @override
    def effective(self, name: str) -> tuple[Callable[[], Tensor], Sequence[int], Tensor] | None:
        if name == "weight":
            return self._kernel, self.main.weight.shape, self.main.weight
        bias = self.main.bias
        return None if bias is None else (lambda: bias, bias.shape, bias)

    @override
    def kernel_and_bias(self) -> tuple[Tensor, Tensor | None]:
        bias = self.main.bias
        return self._kernel().detach().cpu(), None if bias is None else bias.detach().cpu()

    def _kernel(self) -> Tensor:
        kernel: Tensor = self.main.weight
        for branch in self.branches:
            kernel = kernel + branch()
        return kernel


def expand(
    conv: nn.Conv2d, specs: Sequence[Sequence[Any]], name: str | None = None, scale: float = 0.0
) -> ExpandedConv2d:
    """Return a layer around the parameter objects of ``conv``, which preserves its function if ``scale`` is zero.

    Args:
        conv: is not changed.
        specs: kind and kernel size of the branches: of layers, ``"conv"``, ``"identity"``, ``"conv_conv"`` (1x1, then
            the kernel), ``"conv_pool"`` (1x1, then an average over the kernel), ``"pool"``; or of kernels,
            ``"kernel"``, ``"kernel_separable"``, ``"kernel_average"``.
        name: seeds the generator that kernels are drawn from, so that all processes draw the same and the random
            numbers of the run are not changed. None leaves the branches on ``meta``, for a replay.
        scale: of every branch.

    Raises:
        ValueError: a kind is unknown, or layers and kernels are mixed.
    """
    _check_specs(conv, specs)
    main = _plain_layer(conv, conv.weight)
    expanded: ExpandedConv2d
    if specs[0][0] in _OF_LAYERS:
        expanded = BranchedConv2d(main, (_branch(conv, *spec) for spec in specs))
    else:
        expanded = OnlineConv2d(main, (KernelBranch(conv, *spec) for spec in specs))
    if name is not None:
        expanded.initialize(torch.Generator().manual_seed(zlib.crc32(name.encode())), scale)
    return expanded


def _check_specs(conv: nn.Conv2d, specs: Sequence[Sequence[Any]]) -> None:
    """Refuse branches that cannot be merged, as a form of the user may return them."""
    kinds = {spec[0] for spec in specs}
    if not (kinds <= _OF_LAYERS or kinds <= set(_KERNELS)):
        raise ValueError(
            f"`Form.branches` returned the kinds {sorted(kinds)}: expected them to be among {sorted(_OF_LAYERS)}, or "
            f"among {sorted(_KERNELS)}. Layers and kernels do not mix."
        )
    for kind, height, width in specs:
        fits = 1 <= height <= conv.kernel_size[0] and 1 <= width <= conv.kernel_size[1]
        if kind in ("identity", "pool"):
            fits = fits and conv.in_channels == conv.out_channels
        largest = {"identity": max(conv.stride), "pool": max(conv.dilation), "conv_pool": max(conv.dilation)}
        if not fits or largest.get(kind, 1) > 1:
            raise ValueError(
                f"`Form.branches` returned {(kind, height, width)} for `{conv}`: expected a kernel within that of the "
                'convolution, "identity" and "pool" only for as many outputs as inputs, the former only without a '
                "stride, and averages only without dilation."
            )


def is_replaced(layer: nn.Module) -> bool:
    """Check whether another method has put its own layer, or a parametrization, in the place of a branch's layer."""
    return type(layer) not in _LAYERS or parametrize.is_parametrized(layer)


def _is_observed(layer: nn.Module) -> bool:
    """Check whether ``layer`` has to be called, because more than its own forward pass would run."""
    return is_replaced(layer) or "forward" in vars(layer) or any(vars(layer)[hooks] for hooks in _HOOKS)


def _plain_layer(conv: nn.Conv2d, weight: Tensor) -> nn.Conv2d:
    """Return a convolution like ``conv``, without its hooks, with the parameter ``weight`` and the same bias object."""
    layer: nn.Conv2d = convolution_like(conv)
    layer._parameters.update(weight=cast(nn.Parameter, weight), bias=cast("nn.Parameter | None", conv.bias))
    return layer


_OF_LAYERS = {"conv", "identity", "conv_conv", "conv_pool", "pool"}
_KERNELS = ("kernel", "kernel_separable", "kernel_average")


def _branch(conv: nn.Conv2d, kind: str, height: int, width: int) -> Branch:
    """Make a branch of layers."""
    kernel, inputs, outputs = (height, width), conv.in_channels, conv.out_channels
    pads = _pads(conv, kernel)
    own = [before for before, after in pads if before == after >= 0]
    if kind == "conv" and len(own) == 2:
        return Branch([convolution_like(conv, kernel_size=kernel, padding=tuple(own)), _norm(outputs)])
    layers: list[nn.Module] = []
    if kind == "conv":
        layers = [convolution_like(conv, kernel_size=kernel, padding=0)]
    elif kind == "conv_conv":
        whole = convolution_like(conv, kernel_size=kernel, padding=0)
        layers = [convolution_like(conv, out_channels=inputs, **POINTWISE), _norm(inputs), whole]
    elif kind == "conv_pool":
        layers = [convolution_like(conv, **POINTWISE), _norm(outputs)]
    if kind in ("pool", "conv_pool"):
        layers.append(nn.AvgPool2d(kernel, cast("tuple[int, int]", conv.stride)))
    return Branch([*layers, _norm(outputs)], pads)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, device="meta")


def _pads(conv: nn.Conv2d, kernel: tuple[int, int]) -> Pads:
    """What a kernel in the middle of that of ``conv`` has to pad to see what it is placed on."""
    both = [
        _pads_of_axis(conv.padding if isinstance(conv.padding, str) else int(conv.padding[axis]), *sizes)
        for axis, sizes in enumerate(zip(conv.kernel_size, kernel, conv.dilation, strict=True))
    ]
    return both[0], both[1]


def _pads_of_axis(padding: str | int, size: int, own: int, dilation: int) -> tuple[int, int]:
    total = dilation * (size - 1)
    before, after = (padding, padding) if isinstance(padding, int) else (total // 2, total - total // 2)
    if padding == "valid":
        before = after = 0
    start = (size - own) // 2
    return before - dilation * start, after - dilation * (size - own - start)


def _placed(kernel: Tensor, size: Sequence[int]) -> Tensor:
    """Return a kernel of ``size`` with ``kernel`` in its middle."""
    height, width = kernel.shape[2:]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    if (height, width) == tuple(size):
        return kernel
    return F.pad(kernel, (left, size[1] - width - left, top, size[0] - height - top))


def _summed(kernel: Tensor, bias: Tensor | None, merged: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Add kernels, in the middle of ``kernel``, and biases, of one branch or more."""
    for own, shift in merged:
        kernel = kernel + _placed(own, kernel.shape[2:])
        bias = shift if bias is None else bias + shift
    return kernel, cast(Tensor, bias)


def _float64(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def _normalized(norm: nn.BatchNorm2d, kernel: Tensor, bias: Tensor, x: FeatureMap | None) -> tuple[Tensor, Tensor]:
    """Multiply kernel and bias by ``g / sqrt(var + eps)``, and add ``b - mean * g / sqrt(var + eps)`` to the bias."""
    mean, var = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    if norm.training and x is not None:
        mean, var, count = x.statistics(kernel)
        mean = mean + bias
        keep_statistics(norm, mean, var, count)
    scale, shift = scale_and_shift(mean, var, norm.eps, norm.weight, norm.bias, bias)
    return kernel * scale[:, None, None, None], shift


def _in_sequence(first: Tensor, second: Tensor, groups: int) -> Tensor:
    """Return the kernel of a 1x1 convolution followed by another convolution."""
    pointwise = first.reshape(groups, 1, -1, first.shape[1])
    split = second.reshape(groups, -1, second.shape[1], second[0, 0].numel())
    return (pointwise.mT @ split).reshape(len(second), first.shape[1], *second.shape[2:])
