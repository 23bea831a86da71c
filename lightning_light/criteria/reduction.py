"""Reduce scores of weights to scores of channels and of groups, and normalize them for one ranking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_light.validation import validated

__all__ = ["Normalizer", "Reduction", "channel_scores", "combine", "normalize"]

Reduction: TypeAlias = Literal["sum", "mean", "max", "prod", "first"]
Normalizer: TypeAlias = Literal["mean", "sum", "max", "standardization", "gaussian", "lamp"]

_TINY = 1e-8


@validated
def channel_scores(score: Tensor) -> Tensor:
    """Sum a score over everything but its channels: ``(channels, ...)`` -> ``(channels,)``.

    >>> channel_scores(torch.ones(2, 3, 5, 5))
    tensor([75., 75.])
    """
    return score.reshape(len(score), -1).sum(dim=1)


@validated
def combine(scores: Sequence[Tensor], reduction: Reduction) -> Tensor:
    """Combine the scores of all tensors that share the channels into one score per channel.

    Fang et al., 2023, "DepGraph: Towards Any Structural Pruning", aggregates over a group in this way.
    https://arxiv.org/abs/2301.12900

    Args:
        scores: tensors of one shape ``(channels,)``; the first belongs to the layer that produces the channels.
        reduction: ``"sum"``, ``"mean"``, ``"max"``, ``"prod"``, or ``"first"``: only the first counts.

    Raises:
        ValueError: ``scores`` is empty, or the name is not known.

    Example:
        >>> combine([torch.tensor([1.0, 4.0]), torch.tensor([3.0, 0.0])], "mean")
        tensor([2., 2.])
    """
    if not scores:
        raise ValueError(
            f"`combine([], {reduction!r})`: expected the score of at least one tensor, found none. The criterion's "
            "`roles` match no tensor of this group; choose a criterion that reads other roles."
        )
    stacked = torch.stack(list(scores))
    functions: dict[str, Any] = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax, "prod": torch.prod}
    return stacked[0] if reduction == "first" else functions[reduction](stacked, dim=0)


@validated
def normalize(scores: Tensor, normalizer: Normalizer | None) -> Tensor:
    """Normalize the scores of one group, so that they can be compared with those of others.

    =====================  ========================================================================
    ``None``               as they are
    ``"mean"``             ``s / mean(s)``
    ``"sum"``              ``s / sum(s)``
    ``"max"``              ``s / max(s)``
    ``"standardization"``  ``(s - min(s)) / (max(s) - min(s))``
    ``"gaussian"``         ``(s - mean(s)) / std(s)``
    ``"lamp"``             ``s_i / sum(s_j for s_j >= s_i)``; Lee et al., 2021, "Layer-adaptive Sparsity for the
                           Magnitude-based Pruning", with ``s = w**2``. https://arxiv.org/abs/2010.07611
    =====================  ========================================================================

    Scores that are all zero stay zero.

    Args:
        scores: of the channels of one group, shape ``(channels,)``.
        normalizer: a name of the table.

    Raises:
        ValueError: the name is not known.

    Example:
        >>> normalize(torch.tensor([1.0, 3.0, 4.0]), "sum")
        tensor([0.1250, 0.3750, 0.5000])
        >>> normalize(torch.tensor([1.0, 3.0, 4.0]), "lamp")
        tensor([0.1250, 0.4286, 1.0000])
    """
    if normalizer is None or not scores.numel():
        return scores
    if normalizer == "lamp":
        return _lamp(scores)
    if normalizer == "standardization":
        return (scores - scores.min()) / (scores.max() - scores.min() + _TINY)
    if normalizer == "gaussian":
        return (scores - scores.mean()) / (scores.std(correction=min(1, scores.numel() - 1)) + _TINY)
    totals = {"mean": scores.mean(), "sum": scores.sum(), "max": scores.max()}
    return _ratio(scores, totals[normalizer])


def _lamp(scores: Tensor) -> Tensor:
    ascending, order = scores.flatten().sort(stable=True)
    at_least_as_large = ascending.flip(0).cumsum(0).flip(0)
    result = torch.empty_like(ascending)
    result[order] = _ratio(ascending, at_least_as_large)
    return result.reshape(scores.shape)


def _ratio(scores: Tensor, total: Tensor) -> Tensor:
    return scores / torch.where(total == 0, torch.ones_like(total), total)
