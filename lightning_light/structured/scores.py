"""Score channels: a criterion scores every tensor of a dependency group, a reduction makes one score per channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lightning_light.criteria import (
    Criterion,
    Evidence,
    Gathered,
    GroupCriterion,
    Reduction,
    channel_scores,
    combine,
    normalize,
)
from lightning_light.dependency import ChannelGroup, Member
from lightning_light.errors import UnsupportedError
from lightning_light.structured.ranking import Ranking

__all__ = ["check_scorable", "layer_of", "score_groups"]

Role = Literal["out", "in", "norm", "bias"]
_SCORED = ("out", "norm", "in")  # in the order in which "first" takes them


def check_scorable(groups: Sequence[ChannelGroup], criterion: Criterion) -> None:
    """Refuse a criterion that reads no tensor of a group, before anything is removed.

    Raises:
        UnsupportedError: names the group.
    """
    for group in groups:
        if not isinstance(criterion, GroupCriterion) and not _scored(group, criterion):
            raise UnsupportedError(_unscored(group, criterion))


def score_groups(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    criterion: Criterion,
    ranking: Ranking,
    gathered: Gathered,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Score every channel: group name -> scores of shape ``(width,)``; the lowest is removed first.

    Args:
        model: read only.
        groups: the groups to score.
        criterion: scores weights.
        ranking: how scores are combined and normalized; a `GroupCriterion` does so itself.
        gathered: the evidence that ``criterion`` needs.
        seed: for criteria that draw.

    Raises:
        UnsupportedError: the criterion reads no tensor of a group, or what it needs was not gathered for any of them.
    """
    generator = torch.Generator().manual_seed(seed)
    if isinstance(criterion, GroupCriterion):
        found = {g.name: criterion.score_group(model, g, gathered, generator=generator) for g in groups}
        normalizer = None
    else:
        positions = _position_scores(model, groups, criterion, gathered, generator)
        found = {g.name: _combined(g, criterion, positions, ranking.reduction) for g in groups}
        normalizer = ranking.normalizer
    for group in groups:
        if found[group.name] is None:
            raise UnsupportedError(_unscored(group, criterion))
    return {name: normalize(s.cpu(), normalizer) for name, s in found.items() if s is not None}


def _position_scores(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    criterion: Criterion,
    gathered: Gathered,
    generator: torch.Generator,
) -> dict[tuple[str, int], Tensor]:
    """(tensor, dimension) -> one score per position; without those whose evidence was not gathered."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    members = {(m.tensor, m.dim): m for group in groups for m in _scored(group, criterion)}
    scores = {}
    for key, member in members.items():
        tensor, layer, role = tensors[member.tensor], layer_of(member.tensor), cast("Role", member.role)
        where: dict[str, Any] = {"name": member.tensor, "layer": layer, "module": model.get_submodule(layer)}
        pieces = gathered.pieces(criterion.needs, tensor, dim=member.dim, **where)
        if criterion.needs - {"generator"} <= pieces.keys():
            weight = tensor.detach().movedim(member.dim, 0)
            scores[key] = channel_scores(criterion(Evidence(weight, role, generator=generator, **pieces)))
    return scores


def _combined(
    group: ChannelGroup, criterion: Criterion, positions: Mapping[tuple[str, int], Tensor], reduction: Reduction
) -> Tensor | None:
    """One score per channel of ``group``, or None where no tensor has one."""
    members = [m for m in _scored(group, criterion) if (m.tensor, m.dim) in positions]
    scores = [positions[m.tensor, m.dim] for m in members]
    found = [s[m.index.to(s.device)].sum(dim=1).cpu() for s, m in zip(scores, members, strict=True)]
    return combine(found, reduction) if found else None


def _scored(group: ChannelGroup, criterion: Criterion) -> list[Member]:
    """The members that ``criterion`` reads, the layer that makes the channels first."""
    read = [member for member in group.members if member.role in _SCORED and member.role in criterion.roles]
    return sorted(read, key=lambda member: _SCORED.index(member.role))


def layer_of(tensor: str) -> str:
    """Name of the layer that a tensor belongs to; a parametrization is part of its layer."""
    before, found, _ = tensor.partition(".parametrizations.")
    return before if found else tensor.rpartition(".")[0]


def _unscored(group: ChannelGroup, criterion: Criterion) -> str:
    needs = sorted(criterion.needs - {"generator"})
    return (
        f"`criterion={criterion!r}` on `{group.name}`: expected a tensor with one of the roles "
        f"{sorted(criterion.roles)}{f' and with {needs}' if needs else ''} in the layers that share these channels, "
        "found none (for instance a layer without batch norm, or a frozen one). Exclude the layer, "
        f"`targets=Targets(exclude={group.name.partition('#')[0]!r})`, or choose another criterion."
    )
