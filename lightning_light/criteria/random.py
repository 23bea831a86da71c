"""Random criterion: the baseline for all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_light.criteria.evidence import Criterion, Evidence
from lightning_light.validation import validated

__all__ = ["Random", "drawn_seed"]


def drawn_seed(seed: int, generator: torch.Generator | None) -> int:
    """Change ``seed`` by a number that ``generator`` draws, if there is one."""
    if generator is None:
        return seed
    return seed ^ int(torch.randint(2**62, (), generator=generator, device=generator.device))


@validated
@dataclass(frozen=True)
class Random(Criterion):
    """Score drawn uniformly from [0, 1), whatever the weights; the global random state is not changed.

    A strong baseline for channels after fine-tuning: Li et al., 2022, "Revisiting Random Channel Pruning for Neural
    Network Compression". https://arxiv.org/abs/2205.05676

    Args:
        seed: of the scores. Tensors of one shape get different scores only through ``evidence.generator``, from which
            one number is drawn per call; without it the seed alone decides.

    Example:
        >>> scores = Random(seed=1)(Evidence(torch.ones(4, 2)))
        >>> bool(torch.equal(scores, Random(seed=1)(Evidence(torch.zeros(4, 2)))))
        True
    """

    needs: ClassVar[frozenset[str]] = frozenset({"generator"})

    seed: int = 0

    @override
    def __call__(self, evidence: Evidence) -> Tensor:
        own = torch.Generator()  # on the CPU: the same scores on every device
        own.manual_seed(drawn_seed(self.seed, evidence.generator))
        return torch.rand(evidence.weight.shape, generator=own).to(evidence.weight.device)
