"""The scale of a normalization layer: what it multiplies by nearly zero does not get through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_light.criteria.evidence import Criterion, Evidence, full_precision

__all__ = ["BatchNormScale"]


@dataclass(frozen=True)
class BatchNormScale(Criterion):
    """Score ``|gamma|``, the affine scale of the norm behind the channels; no other tensor counts.

    Liu et al., 2017, "Learning Efficient Convolutional Networks through Network Slimming". The paper trains with an
    L1 penalty on ``gamma`` so that many of them shrink; without one, scales may differ too little to rank.
    https://arxiv.org/abs/1708.06519
    """

    roles: ClassVar[frozenset[str]] = frozenset({"norm"})

    @override
    def __call__(self, evidence: Evidence) -> Tensor:
        return full_precision(evidence.weight).abs()
