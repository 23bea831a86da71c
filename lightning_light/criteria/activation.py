"""Activation-based criteria."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_light.criteria.evidence import Criterion, Evidence, full_precision, spread
from lightning_light.validation import validated

__all__ = ["Activation", "Wanda"]


@validated
@dataclass(frozen=True)
class Activation(Criterion):
    """Score ``E[|a|]`` of a channel over the gathered batches, spread evenly over its weights.

    The mean-activation criterion of Molchanov et al., 2017, "Pruning Convolutional Neural Networks for Resource
    Efficient Inference", on absolute values, so that it is meaningful before a ReLU as well.
    https://arxiv.org/abs/1611.06440
    """

    needs: ClassVar[frozenset[str]] = frozenset({"activation"})
    roles: ClassVar[frozenset[str]] = frozenset({"out"})

    @override
    def __call__(self, evidence: Evidence) -> Tensor:
        return spread(evidence.need("activation").abs(), evidence.weight)


@validated
@dataclass(frozen=True)
class Wanda(Criterion):
    """Score ``|w| * ||x||_2``: weights times the norm of the inputs they are multiplied with.

    Sun et al., 2024, "A Simple and Effective Pruning Approach for Large Language Models". The paper compares the
    weights of one output with each other; here the scope decides. https://arxiv.org/abs/2306.11695

    Example:
        >>> import torch
        >>> Wanda()(Evidence(torch.tensor([[1.0, -2.0]]), inputs=torch.tensor([[3.0, 1.0]])))
        tensor([[3., 2.]])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"inputs"})
    roles: ClassVar[frozenset[str]] = frozenset({"out"})

    @override
    def __call__(self, evidence: Evidence) -> Tensor:
        return full_precision(evidence.weight).abs() * evidence.need("inputs")
