"""Chance: the baseline that a criterion has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_light.criteria.evidence import Criterion, Evidence

__all__ = ["Random"]


@dataclass(frozen=True)
class Random(Criterion):
    """Score drawn uniformly from [0, 1), without a look at the weights; global random state is not touched.

    A strong baseline for channels after fine-tuning: Li et al., 2022, "Revisiting Random Channel Pruning for Neural
    Network Compression". https://arxiv.org/abs/2205.05676

    Args:
        seed: other seeds, other scores. Tensors of one shape differ only through ``evidence.generator``, which is
            drawn from once a call; without it the seed alone decides.

    Example:
        >>> scores = Random(seed=1)(Evidence(torch.ones(4, 2)))
        >>> bool(torch.equal(scores, Random(seed=1)(Evidence(torch.zeros(4, 2)))))
        True
    """

    needs: ClassVar[frozenset[str]] = frozenset({"generator"})

    seed: int = 0

    @override
    def __call__(self, evidence: Evidence) -> Tensor:
        seed = self.seed
        if (given := evidence.generator) is not None:
            seed ^= int(torch.randint(2**62, (), generator=given, device=given.device))
        own = torch.Generator().manual_seed(seed)  # on the CPU: the same scores on every device
        return torch.rand(evidence.weight.shape, generator=own).to(evidence.weight.device)
