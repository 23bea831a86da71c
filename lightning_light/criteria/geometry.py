"""Geometric-median criterion: filters near the center of the others are removed first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_light.criteria.evidence import Criterion, Evidence, full_precision, spread
from lightning_light.validation import validated

__all__ = ["GeometricMedian"]


@validated
@dataclass(frozen=True)
class GeometricMedian(Criterion):
    """Score ``sum_j ||w_i - w_j||_2`` of filter ``i``, spread evenly over its weights.

    The filter with the smallest sum lies nearest to the geometric median of all: the others can stand in for it.
    He et al., 2019, "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration".
    https://arxiv.org/abs/1811.00250

    Example:
        >>> import torch
        >>> GeometricMedian()(Evidence(torch.tensor([[0.0], [1.0], [5.0]])))
        tensor([[6.],
                [5.],
                [9.]])
    """

    roles: ClassVar[frozenset[str]] = frozenset({"out"})

    @override
    def __call__(self, evidence: Evidence) -> Tensor:
        rows = full_precision(evidence.weight).reshape(len(evidence.weight), -1)
        # the matmul form of cdist loses the small distances that decide here
        distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
        return spread(distances.sum(dim=1), evidence.weight)
