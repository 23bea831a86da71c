"""Sparsity learning: push the channels that are about to leave towards zero, so that little is lost when they go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_light.criteria.reduction import channel_scores
from lightning_light.dependency import ChannelGroup, Member

__all__ = ["GroupLasso", "GrowingRegularization", "SparsityRegularizer", "add_penalty", "group_norms"]

_TINY = 1e-8


class SparsityRegularizer(ABC):
    """A penalty on whole channels, added to the gradients before every optimizer step until the last cut."""

    @abstractmethod
    def factors(self, norms: Tensor, progress: float) -> Tensor:
        """How strongly each channel's weights shrink: gradient = factor * weight.

        Args:
            norms: L2 norm of all weights of each channel of one group, shape ``(channels,)``.
            progress: of the phase, in [0, 1].
        """


@dataclass(frozen=True)
class GroupLasso(SparsityRegularizer):
    """Coupled channels of a small norm shrink more: gradient ``strength * 2 ** (alpha * rank) * w``.

    ``rank = (max - norm) / (max - min)`` over the channels of a group, whose norm counts all coupled layers together.

    Fang et al., 2023, "DepGraph: Towards Any Structural Pruning", section 3.3. https://arxiv.org/abs/2301.12900

    Args:
        strength: of the penalty, relative to the loss; at least 0.
        alpha: how much more the weakest channel shrinks than the strongest: ``2 ** alpha`` times.

    Raises:
        ValueError: a negative value.
    """

    strength: float = 1e-4
    alpha: float = 4.0

    def __post_init__(self) -> None:
        _require_positive("GroupLasso", strength=self.strength, alpha=self.alpha)

    @override
    def factors(self, norms: Tensor, progress: float) -> Tensor:
        rank = (norms.max() - norms) / (norms.max() - norms.min() + _TINY)
        return self.strength * 2.0 ** (self.alpha * rank)


@dataclass(frozen=True)
class GrowingRegularization(SparsityRegularizer):
    """Weight decay that grows during the phase, the faster the smaller a channel is.

    Gradient ``strength * (1 + growth * p * rank) * w``, where ``p`` is the progress of the phase and
    ``rank = (max - norm ** 2) / (max - min)`` over the channels of a group.

    After Wang et al., 2021, "Neural Pruning via Growing Regularization". https://arxiv.org/abs/2012.09243

    Args:
        strength: weight decay at the beginning; at least 0.
        growth: by how many times the weakest channel's decay has grown at the end; at least 0.

    Raises:
        ValueError: a negative value.
    """

    strength: float = 1e-4
    growth: float = 10.0

    def __post_init__(self) -> None:
        _require_positive("GrowingRegularization", strength=self.strength, growth=self.growth)

    @override
    def factors(self, norms: Tensor, progress: float) -> Tensor:
        squares = norms.square()
        rank = (squares.max() - squares) / (squares.max() - squares.min() + _TINY)
        return self.strength * (1.0 + self.growth * progress * rank)


def _require_positive(name: str, **values: float) -> None:
    for argument, value in values.items():
        if not value >= 0.0:
            raise ValueError(f"`{name}({argument}={value})`: expected a number >= 0, for instance `{argument}=1e-4`.")


def group_norms(tensors: Mapping[str, Tensor], group: ChannelGroup) -> Tensor:
    """L2 norm over all weights that belong to each channel, shape ``(width,)``."""
    squares = [_by_channel(tensors[m.tensor].detach().float().square(), m) for m in _weights(group)]
    return torch.stack(squares).sum(dim=0).sqrt() if squares else torch.ones(group.width)


@torch.no_grad()
def add_penalty(
    model: nn.Module, groups: Sequence[ChannelGroup], learning: SparsityRegularizer, progress: float
) -> None:
    """Add the penalty's gradient to every ``.grad`` that is there; see `SparsityRegularizer.factors`."""
    tensors = dict(model.named_parameters())
    for group in groups:
        factors = learning.factors(group_norms(tensors, group), progress)
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
