"""Regularize whole channels during training, so that those removed next are close to zero by then."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_light.criteria.reduction import channel_scores
from lightning_light.dependency import ChannelGroup, Member
from lightning_light.validation import NonNegativeFloat, validated

__all__ = ["GroupLasso", "GrowingRegularization", "SparsityRegularizer", "add_penalty", "group_norms"]

_TINY = 1e-8


class SparsityRegularizer(ABC):
    """Penalize whole channels: gradients added before every optimizer step until the last cut.

    Subclasses are frozen dataclasses.
    """

    @abstractmethod
    def factors(self, norms: Tensor, progress: float) -> Tensor:
        """Return the factor of each channel: the gradient added to its weights is ``factor * weight``.

        Args:
            norms: L2 norm of all weights of each channel of one group, shape ``(channels,)``.
            progress: from the start of training to the last cut, in [0, 1].
        """


@validated
@dataclass(frozen=True)
class GroupLasso(SparsityRegularizer):
    """Shrink coupled channels of small norm more: gradient ``strength * 2 ** (alpha * rank) * w``.

    ``rank = (max - norm) / (max - min)`` over the channels of a group; the norm is that of all coupled layers together.

    Fang et al., 2023, "DepGraph: Towards Any Structural Pruning", section 3.3. https://arxiv.org/abs/2301.12900

    Args:
        strength: of the penalty, relative to the loss; at least 0.
        alpha: the channel of the smallest norm shrinks ``2 ** alpha`` times as fast as that of the largest.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is negative.
    """

    strength: NonNegativeFloat = 1e-4
    alpha: NonNegativeFloat = 4.0

    @override
    def factors(self, norms: Tensor, progress: float) -> Tensor:
        rank = (norms.max() - norms) / (norms.max() - norms.min() + _TINY)
        return self.strength * 2.0 ** (self.alpha * rank)


@validated
@dataclass(frozen=True)
class GrowingRegularization(SparsityRegularizer):
    """Apply a weight decay that grows until the last cut, faster for channels of small norm.

    Gradient ``strength * (1 + growth * p * rank) * w``, where ``p`` is the progress to the last cut and
    ``rank = (max - norm ** 2) / (max - min)`` over the channels of a group.

    After Wang et al., 2021, "Neural Pruning via Growing Regularization". https://arxiv.org/abs/2012.09243

    Args:
        strength: weight decay at the beginning; at least 0.
        growth: relative growth of the decay of the channel of the smallest norm; at least 0.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is negative.
    """

    strength: NonNegativeFloat = 1e-4
    growth: NonNegativeFloat = 10.0

    @override
    def factors(self, norms: Tensor, progress: float) -> Tensor:
        squares = norms.square()
        rank = (squares.max() - squares) / (squares.max() - squares.min() + _TINY)
        return self.strength * (1.0 + self.growth * progress * rank)


def group_norms(tensors: Mapping[str, Tensor], group: ChannelGroup) -> Tensor:
    """Compute the L2 norm over all weights that belong to each channel, shape ``(width,)``."""
    squares = [_by_channel(tensors[m.tensor].detach().float().square(), m) for m in _weights(group)]
    return torch.stack(squares).sum(dim=0).sqrt() if squares else torch.ones(group.width)


@torch.no_grad()
def add_penalty(
    model: nn.Module, groups: Sequence[ChannelGroup], regularizer: SparsityRegularizer, progress: float
) -> None:
    """Add the gradient of the penalty to every ``.grad`` that exists; see `SparsityRegularizer.factors`."""
    tensors = dict(model.named_parameters())
    for group in groups:
        factors = regularizer.factors(group_norms(tensors, group), progress)
        for member in _weights(group):
            parameter = tensors[member.tensor]
            if parameter.grad is None:
                continue
            scale = torch.zeros(parameter.shape[member.dim], device=parameter.device)
            index = member.index.to(parameter.device)
            scale[index] = factors.to(parameter.device).unsqueeze(1).expand(index.shape)
            shape = [-1 if dim == member.dim else 1 for dim in range(parameter.dim())]
            parameter.grad.add_((scale.reshape(shape) * parameter).to(parameter.grad.dtype))


def _weights(group: ChannelGroup) -> list[Member]:
    return [member for member in group.members if member.role in {"out", "in", "norm"}]


def _by_channel(values: Tensor, member: Member) -> Tensor:
    positions = channel_scores(values.movedim(member.dim, 0))
    return positions[member.index.to(positions.device)].sum(dim=1).cpu()
