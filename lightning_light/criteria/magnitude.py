"""Magnitude criteria: of weights, and of the scales of batch norms (network slimming)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_light.criteria.evidence import Criterion, Evidence, full_precision
from lightning_light.validation import PositiveFloat, validated

__all__ = ["BatchNormScale", "Magnitude"]


@validated
@dataclass(frozen=True)
class Magnitude(Criterion):
    """Score ``|w| ** p``.

    For single weights the order is the same for every ``p``: Han et al., 2015, "Learning both Weights and Connections
    for Efficient Neural Networks", https://arxiv.org/abs/1506.02626. Summed over a filter, ``p=1`` is Li et al., 2017,
    "Pruning Filters for Efficient ConvNets", https://arxiv.org/abs/1608.08710; ``p=2`` stresses large weights.

    Args:
        p: the exponent, above 0.

    Raises:
        ValueError: ``p`` is not above 0.

    Example:
        >>> import torch
        >>> Magnitude(p=2.0)(Evidence(torch.tensor([[1.0, -2.0], [0.5, 0.0]])))
        tensor([[1.0000, 4.0000],
                [0.2500, 0.0000]])
    """

    p: PositiveFloat = 2.0

    @override
    def __call__(self, evidence: Evidence) -> Tensor:
        weight = full_precision(evidence.weight)
        return weight.square() if self.p == 2.0 else weight.abs() ** self.p


@validated
@dataclass(frozen=True)
class BatchNormScale(Criterion):
    """Score ``|gamma|``, the affine scale of the norm layer after the channels; other tensors do not count.

    Liu et al., 2017, "Learning Efficient Convolutional Networks through Network Slimming". The paper trains with an
    L1 penalty on ``gamma`` so that many of them shrink; without one, scales may differ too little to rank.
    https://arxiv.org/abs/1708.06519
    """

    roles: ClassVar[frozenset[str]] = frozenset({"norm"})

    @override
    def __call__(self, evidence: Evidence) -> Tensor:
        return full_precision(evidence.weight).abs()
