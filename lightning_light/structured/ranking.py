"""Rankings: among which channels the least important is looked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_light.dependency import ChannelGroup

__all__ = ["Global", "Isomorphic", "Local", "Ranking", "removal_order"]


class Ranking(ABC):
    """Says which groups of channels are ranked together, in one *scope*."""

    @abstractmethod
    def scope(self, group: ChannelGroup, model: nn.Module) -> str:
        """Groups with the same name of a scope are ranked together."""


@dataclass(frozen=True)
class Local(Ranking):
    """Every group of layers by itself: all lose the same share of their channels."""

    @override
    def scope(self, group: ChannelGroup, model: nn.Module) -> str:
        return group.name


@dataclass(frozen=True)
class Global(Ranking):
    """All channels of the network in one list: where there is more to lose, more is lost."""

    @override
    def scope(self, group: ChannelGroup, model: nn.Module) -> str:
        return "all"


@dataclass(frozen=True)
class Isomorphic(Ranking):
    """Groups of the same structure together: a head is compared with heads, a residual stream with streams.

    Fang et al., 2024, "Isomorphic Pruning for Vision Models". https://arxiv.org/abs/2407.04616
    """

    @override
    def scope(self, group: ChannelGroup, model: nn.Module) -> str:
        kinds = [type(model.get_submodule(m.tensor.rpartition(".")[0])).__name__ for m in group.members]
        places = [f"{kind}.{m.role}.{m.dim}.{m.index.shape[1]}" for kind, m in zip(kinds, group.members, strict=True)]
        return " ".join(sorted(places))


def removal_order(
    groups: Sequence[ChannelGroup], scores: Mapping[str, Tensor], scopes: Sequence[str], original: Mapping[str, int]
) -> tuple[Tensor, Tensor]:
    """All channels in the order in which they would leave.

    Within a scope by score; between scopes so that each loses the same share of the channels it once had.

    Args:
        groups: the groups that may lose channels.
        scores: group name -> one score a channel, shape ``(width,)``.
        scopes: of each group.
        original: group name -> its width before the first cut.

    Returns:
        Index of the group in ``groups``, and of the channel in the group; both of shape ``(channels in all,)``.
    """
    numbers = torch.cat([torch.full((group.width,), number) for number, group in enumerate(groups)])
    channels = torch.cat([torch.arange(group.width) for group in groups])
    values = torch.cat([scores[group.name].double().cpu() for group in groups])
    keys = torch.empty_like(values)
    names = sorted(set(scopes))
    belongs = torch.tensor([names.index(scope) for scope in scopes])[numbers]
    for number in range(len(names)):
        inside = belongs == number
        members = [group for group, scope in zip(groups, scopes, strict=True) if scope == names[number]]
        once, now = sum(original[group.name] for group in members), int(inside.sum())
        rank = torch.empty(now, dtype=torch.double)
        rank[torch.argsort(values[inside], stable=True)] = torch.arange(now, dtype=torch.double)
        keys[inside] = (rank + (once - now) + 0.5) / once
    order = torch.argsort(keys, stable=True)
    return numbers[order], channels[order]
