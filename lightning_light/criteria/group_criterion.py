"""Criteria that score coupled channels all at once, and which method can use which criterion."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_light.criteria.evidence import Criterion, Evidence
from lightning_light.criteria.gathered import KINDS, Gathered
from lightning_light.errors import UnsupportedError
from lightning_light.validation import validated

if TYPE_CHECKING:
    from lightning_light.dependency import ChannelGroup

__all__ = ["GroupCriterion", "check_needs"]


class GroupCriterion(Criterion):
    """Score coupled channels all at once, from every tensor of their dependency group.

    For structured pruning alone: masks and factors have no dependency groups.
    """

    @abstractmethod
    def score_group(
        self, model: nn.Module, group: ChannelGroup, gathered: Gathered, *, generator: torch.Generator | None = None
    ) -> Tensor | None:
        """Return one score per channel of ``group``, shape ``(width,)``; the lowest are removed first.

        None where no tensor of the group is one that this criterion reads.
        """

    @override
    def __call__(self, evidence: Evidence) -> Tensor:
        raise UnsupportedError(
            f"`{self!r}`: expected a dependency group to score, found a single tensor. Use it in "
            "`StructuredPruning` or `prune_channels`."
        )


@validated
def check_needs(
    call: str, criterion: Criterion, supported: frozenset[str] = KINDS, *, scores_groups: bool = False
) -> None:
    """Refuse, at construction, a criterion that needs evidence the method cannot gather.

    Args:
        call: the method's name as the user wrote it.
        criterion: the criterion.
        supported: the kinds of evidence that the method gathers.
        scores_groups: whether the method scores coupled channels, so that it can use a `GroupCriterion`.

    Raises:
        UnsupportedError: the method does not gather what the criterion needs, or scores weights one by one and the
            criterion scores channels.
    """
    if not scores_groups and (isinstance(criterion, GroupCriterion) or "out" not in criterion.roles):
        raise UnsupportedError(
            f"`{call}(criterion={criterion!r})`: expected a criterion that scores single weights, found one "
            "that scores whole channels. Use `Magnitude()` here, and this one in `StructuredPruning` or "
            "`prune_channels`."
        )
    missing = sorted(criterion.needs - supported - {"generator"} - ({"gates"} if scores_groups else set()))
    if missing:
        raise UnsupportedError(
            f"`{call}(criterion={criterion!r})`: expected a criterion that needs some of {sorted(supported)}, found "
            f"one that needs {missing}, which `{call}` does not gather. Use for instance `Magnitude()`."
        )
