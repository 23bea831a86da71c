"""Batch statistics of linear functions of a feature map, so that the batch norms behind them need not run.

A matrix ``w`` that is applied at every position of ``x`` has outputs of mean ``w m`` and variances ``diag(w C w^T)``,
where ``m`` and ``C`` are the mean and the covariance of the channels of ``x`` over samples and positions. So 1x1
convolutions, also of averages, need not run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

__all__ = ["FeatureMap", "Moments", "grouped_product", "keep_statistics"]

_Pair: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of the channels of a feature map, at least in float32.

    Attributes:
        mean: ``(channels,)``.
        covariance: within each group, ``(groups, channels / groups, channels / groups)``.
        count: positions in all samples.
    """

    mean: Tensor
    covariance: Tensor
    count: int

    def with_zeros(self, count: int) -> Moments:
        """Return the moments after zeros have been added, up to ``count`` positions."""
        share = self.count / count
        mean = self.mean.view(self.covariance.shape[:2])
        between = share * (1.0 - share) * mean[:, :, None] * mean[:, None]
        return Moments(share * self.mean, share * self.covariance + between, count)

    def of_product(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the variance of the product with a grouped matrix ``(out, in / groups)``."""
        groups = len(self.covariance)
        split = matrix.reshape(groups, -1, matrix.shape[1])
        mean = grouped_product(matrix, self.mean[:, None], groups)[:, 0]
        return mean, ((split @ self.covariance) * split).sum(2).flatten().clamp_min(0.0)


class FeatureMap:
    """A feature map whose moments are computed when they are needed.

    Args:
        x: ``(samples, channels, height, width)``.
        groups: within which covariances are needed.
        pads: zeros around ``x``, in the order of `torch.nn.functional.pad`; negative to leave out its border.
    """

    def __init__(
        self, x: Tensor, groups: int, pads: tuple[int, ...] = (0, 0, 0, 0), *, is_output: bool = False
    ) -> None:
        self._x, self._groups, self._pads, self._is_output = x, groups, pads, is_output

    @cached_property
    def moments(self) -> Moments:
        """Mean and covariance of all positions, the zeros included."""
        values = self._values()
        mean, covariance = cast("tuple[Tensor, Tensor]", _Moments.apply(values, self._groups))  # type: ignore[no-untyped-call]
        return Moments(mean, covariance, values.numel() // values.shape[1])

    def padded(self, pads: tuple[int, ...]) -> FeatureMap:
        """Return the map with zeros around it, which takes its moments from those of this one."""
        if not any(pads):
            return self
        padded = FeatureMap(self._values(), self._groups, pads)
        if min(pads) >= 0:
            samples, _, height, width = padded._x.shape
            padded.moments = self.moments.with_zeros(samples * (height + sum(pads[2:])) * (width + sum(pads[:2])))
        return padded

    def behind(self, layer: nn.Module, kernel: Tensor) -> FeatureMap:
        """Return what statistics of ``layer``'s outputs are computed from.

        Args:
            layer: the last one of a sequence: a convolution or an average.
            kernel: of the whole sequence, from the values of this map on.
        """
        size, stride = cast(_Pair, layer.kernel_size), cast(_Pair, layer.stride)
        if isinstance(layer, nn.AvgPool2d):  # as a depthwise convolution, which is faster on a CPU
            average = self._x.new_ones(self._x.shape[1], 1, *size)
            sums = FeatureMap(self._convolved(average, stride), self._groups)
            of_sums, elements = sums.moments, average[0].numel()
            sums.moments = Moments(of_sums.mean / elements, of_sums.covariance / elements**2, of_sums.count)
            return sums
        rows, columns = cast(_Pair, layer.padding)
        padded = self.padded((columns, columns, rows, rows))
        if size != (1, 1):
            outputs = padded._convolved(kernel.to(self._x.dtype), stride, cast(_Pair, layer.dilation))
            return FeatureMap(outputs, outputs.shape[1], is_output=True)
        if stride != (1, 1):
            return FeatureMap(padded._values()[..., :: stride[0], :: stride[1]], self._groups)
        return padded

    def statistics(self, kernel: Tensor) -> tuple[Tensor, Tensor, int]:
        """Return mean and variance of the outputs of ``kernel``, and the number of positions."""
        moments = self.moments
        if self._is_output:
            return moments.mean, moments.covariance.flatten(), moments.count
        return *moments.of_product(kernel.sum((2, 3))), moments.count

    def _values(self) -> Tensor:
        return F.pad(self._x, self._pads) if any(self._pads) else self._x

    def _convolved(self, kernel: Tensor, stride: _Pair, dilation: _Pair = (1, 1)) -> Tensor:
        left, right, top, bottom = self._pads
        groups = self._x.shape[1] // kernel.shape[1]
        if left == right >= 0 and top == bottom >= 0:
            return F.conv2d(self._x, kernel, None, stride, (top, left), dilation, groups)
        return F.conv2d(self._values(), kernel, None, stride, 0, dilation, groups)


class _Moments(torch.autograd.Function):
    """Mean and covariance of the channels, whose backward pass is one 1x1 convolution."""

    generate_vmap_rule = True

    @staticmethod
    @override
    def forward(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        values = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(2)
        mean, count = values.mean((0, 2)), x.numel() // x.shape[1]
        centered = (values - mean[:, None]).reshape(len(x), groups, -1, values.shape[2])
        products = centered.square_().sum((0, 3))[..., None] if groups == len(mean) else (centered @ centered.mT).sum(0)
        return mean, products / count

    @staticmethod
    @override
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
        x, _ = inputs
        ctx.save_for_backward(x, output[0])

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        x, mean = ctx.saved_tensors
        of_mean, of_covariance = gradients
        groups, count = len(of_covariance), x.numel() // x.shape[1]
        matrix = ((of_covariance + of_covariance.mT) / count).flatten(0, 1)
        shift = (of_mean / count - grouped_product(matrix, mean[:, None], groups)[:, 0]).to(x.dtype)
        matrix = matrix[..., None, None].to(x.dtype)
        if groups == len(mean):
            return torch.addcmul(shift[:, None, None], x, matrix[:, 0]), None
        return F.conv2d(x, matrix, shift, groups=groups), None


def grouped_product(matrix: Tensor, values: Tensor, groups: int) -> Tensor:
    """Multiply a grouped matrix ``(out, in / groups)`` with ``(in, n)``."""
    split = matrix.reshape(groups, -1, matrix.shape[1])
    return (split @ values.reshape(groups, matrix.shape[1], -1)).flatten(0, 1)


@torch.no_grad()
def keep_statistics(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Update the running statistics of a batch norm by those of a batch of ``count`` positions.

    Raises:
        ValueError: a single position has no variance.
    """
    if count < 2:
        raise ValueError(
            "A batch norm of a branch in training mode: expected more than one position per channel, found one sample "
            "with one. Train with larger batches, or in evaluation mode."
        )
    running_mean, running_var, batches = cast("tuple[Tensor, ...]", tuple(norm._buffers.values()))
    batches.add_(1)
    weight = 1.0 / float(batches) if norm.momentum is None else norm.momentum
    running_mean.lerp_(mean.to(running_mean), weight)
    running_var.lerp_((var * (count / (count - 1))).to(running_var), weight)
