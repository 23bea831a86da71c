"""Layers of lighter operators that `torch.nn` does not have."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

__all__ = ["ChannelPermutation", "FireConv2d", "GhostConv2d"]


class ChannelPermutation(nn.Module):
    """Select channels by a fixed index.

    Args:
        channels: how many; the index is the identity at first.
    """

    index: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("index", torch.arange(channels))

    @override
    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.index)


class GhostConv2d(nn.Module):
    """Compute some channels by a convolution, and the others from them by a depthwise one.

    Args:
        primary: the convolution.
        cheap: the depthwise convolution, with the channels of ``primary`` as its groups.
        channels: of the output.
    """

    def __init__(self, primary: nn.Conv2d, cheap: nn.Conv2d, channels: int) -> None:
        super().__init__()
        self.primary, self.cheap, self.order = primary, cheap, ChannelPermutation(channels)

    @override
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.primary(x)
        z: Tensor = self.order(torch.cat([y, self.cheap(y)], 1))
        return z


class FireConv2d(nn.Module):
    """Squeeze channels, and compute a part of the outputs from them pointwise and the others by a larger kernel.

    Args:
        squeeze: a pointwise convolution.
        pointwise: of its outputs.
        spatial: of its outputs.
    """

    def __init__(self, squeeze: nn.Conv2d, pointwise: nn.Conv2d, spatial: nn.Conv2d) -> None:
        super().__init__()
        self.squeeze, self.pointwise, self.spatial = squeeze, pointwise, spatial
        self.order = ChannelPermutation(pointwise.out_channels + spatial.out_channels)

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x)
        y: Tensor = self.order(torch.cat([self.pointwise(x), self.spatial(x)], 1))
        return y
