"""What a channel says: one that is silent on the data does little."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_light.criteria.evidence import Criterion, Evidence, spread

__all__ = ["Activation"]


@dataclass(frozen=True)
class Activation(Criterion):
    """Score ``E[|a|]`` of a channel over the gathered batches, spread evenly over its weights.

    The mean-activation criterion of Molchanov et al., 2017, "Pruning Convolutional Neural Networks for Resource
    Efficient Inference", on absolute values, so that it holds before a ReLU as well.
    https://arxiv.org/abs/1611.06440
    """

    needs: ClassVar[frozenset[str]] = frozenset({"activation"})
    roles: ClassVar[frozenset[str]] = frozenset({"out"})

    @override
    def __call__(self, evidence: Evidence) -> Tensor:
        return spread(evidence.need("activation").abs(), evidence.weight)
