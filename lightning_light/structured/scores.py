"""Scores of channels: a criterion reads every tensor of a group, a reduction makes one number a channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_light.criteria.evidence import Criterion, Evidence
from lightning_light.criteria.reduction import Normalizer, Reduction, channel_scores, combine, normalize
from lightning_light.dependency import ChannelGroup, Member

__all__ = ["Gathered", "score_groups"]


@dataclass(frozen=True)
class Gathered:
    """What was seen of a model over some batches, by tensor or layer name; empty where a criterion needs nothing.

    Attributes:
        grad: mean gradient; shape of the tensor.
        grad_squared: mean squared gradient; shape of the tensor.
        activation: layer name -> mean absolute output, shape ``(channels,)``.
    """

    grad: Mapping[str, Tensor] = field(default_factory=dict)
    grad_squared: Mapping[str, Tensor] = field(default_factory=dict)
    activation: Mapping[str, Tensor] = field(default_factory=dict)


def score_groups(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    criterion: Criterion,
    *,
    gathered: Gathered,
    reduction: Reduction,
    normalizer: Normalizer | None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Group name -> one score a channel, shape ``(width,)``; the lowest goes first.

    Raises:
        ValueError: the criterion reads no tensor of a group, or what it needs was not gathered for it.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    cache: dict[tuple[str, int], Tensor | None] = {}
    scores = {}
    for group in groups:
        found = []
        for member in sorted(group.members, key=lambda m: ("out", "norm", "in").index(m.role) if _counts(m) else 9):
            key = (member.tensor, member.dim)
            if key not in cache:
                cache[key] = _positions(tensors[member.tensor], member, criterion, gathered, generator)
            positions = cache[key]
            if positions is not None:
                found.append(positions[member.index.to(positions.device)].sum(dim=1))
        if not found:
            raise ValueError(
                f"`{criterion!r}` reads {sorted(criterion.roles)}, but the layers of `{group.name}` have no such "
                "tensor (for instance no batch norm). Exclude the layer, `targets=Targets(exclude=...)`, or choose "
                "another criterion."
            )
        scores[group.name] = normalize(combine([score.cpu() for score in found], reduction), normalizer)
    return scores


def _counts(member: Member) -> bool:
    return member.role in {"out", "norm", "in"}


def _positions(
    tensor: Tensor, member: Member, criterion: Criterion, gathered: Gathered, generator: torch.Generator | None
) -> Tensor | None:
    """One score a position along the member's dimension, or None where the criterion does not read it."""
    if not _counts(member) or member.role not in criterion.roles:
        return None
    pieces: dict[str, Any] = {"generator": generator}
    for name in ("grad", "grad_squared"):
        if name in criterion.needs:
            known = getattr(gathered, name).get(member.tensor)
            if known is None:
                return None
            pieces[name] = known.movedim(member.dim, 0)
    if "activation" in criterion.needs:
        layer = member.tensor.rpartition(".")[0]
        if member.role != "out" or layer not in gathered.activation:
            return None
        pieces["activation"] = gathered.activation[layer]
    weight = tensor.detach().movedim(member.dim, 0)
    return channel_scores(criterion(Evidence(weight=weight, role=member.role, **pieces)))  # type: ignore[arg-type]
