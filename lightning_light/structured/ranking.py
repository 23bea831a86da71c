"""Rankings: which channels are compared with each other when the least important ones are chosen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_light.criteria.reduction import Normalizer, Reduction
from lightning_light.dependency import ChannelGroup
from lightning_light.validation import validated

__all__ = ["Global", "Isomorphic", "Local", "Ranking", "removal_order"]


@validated
@dataclass(frozen=True)
class Ranking(ABC):
    """Decide which dependency groups are ranked together, and how their scores become comparable.

    Subclasses are frozen dataclasses that define `scope`. A `GroupCriterion` reduces and normalizes its scores itself.

    Args:
        reduction: how the scores of the coupled layers of a group become one score per channel: ``"sum"``, ``"mean"``,
            ``"max"``, ``"prod"`` or ``"first"``.
        normalizer: how the scores of a group are scaled before groups are compared: ``"mean"``, ``"sum"``, ``"max"``,
            ``"standardization"``, ``"gaussian"``, ``"lamp"`` or None.

    Raises:
        ValueError: a name is unknown.
    """

    reduction: Reduction = "mean"
    normalizer: Normalizer | None = "mean"

    @abstractmethod
    def scope(self, group: ChannelGroup, model: nn.Module) -> str:
        """Name the scope of ``group``: groups of one scope are ranked together."""


@validated
@dataclass(frozen=True)
class Local(Ranking):
    """Rank each dependency group by itself: all lose the same fraction of their channels.

    Args:
        reduction: see `Ranking`.
        normalizer: see `Ranking`.

    Raises:
        ValueError: a name is unknown.
    """

    @override
    def scope(self, group: ChannelGroup, model: nn.Module) -> str:
        return group.name


@validated
@dataclass(frozen=True)
class Global(Ranking):
    """Rank all channels of the network together: layers with many unimportant channels lose more.

    Args:
        reduction: see `Ranking`.
        normalizer: see `Ranking`.

    Raises:
        ValueError: a name is unknown.
    """

    @override
    def scope(self, group: ChannelGroup, model: nn.Module) -> str:
        return "all"


@validated
@dataclass(frozen=True)
class Isomorphic(Ranking):
    """Rank groups of the same structure together: attention heads with heads, residual streams with streams.

    Fang et al., 2024, "Isomorphic Pruning for Vision Models". https://arxiv.org/abs/2407.04616

    Args:
        reduction: see `Ranking`.
        normalizer: see `Ranking`.

    Raises:
        ValueError: a name is unknown.
    """

    @override
    def scope(self, group: ChannelGroup, model: nn.Module) -> str:
        kinds = [type(model.get_submodule(m.tensor.rpartition(".")[0])).__name__ for m in group.members]
        places = [f"{kind}.{m.role}.{m.dim}.{m.index.shape[1]}" for kind, m in zip(kinds, group.members, strict=True)]
        return " ".join(sorted(places))


@validated
def removal_order(
    groups: Sequence[ChannelGroup], scores: Mapping[str, Tensor], scopes: Sequence[str], original: Mapping[str, int]
) -> tuple[Tensor, Tensor]:
    """Order all channels by when they are removed.

    Within a scope by score; between scopes so that each loses the same fraction of its original channels.

    Args:
        groups: the groups that may lose channels.
        scores: group name -> one score per channel, shape ``(width,)``.
        scopes: of each group.
        original: group name -> its width before the first cut.

    Returns:
        Index of the group in ``groups``, and of the channel in the group; both of shape ``(all channels,)``.
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
