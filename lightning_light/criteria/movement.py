"""Where is a weight going? One that training moves towards zero may go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_light.criteria.evidence import Criterion, Evidence, full_precision

__all__ = ["Movement", "SoftMovement"]


@dataclass(frozen=True)
class Movement(Criterion):
    """Score ``-sum_t w_t * dL/dw_t`` over the optimizer steps: positive where training moves away from zero.

    Sanh et al., 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", for fine-tuning a trained network. In the
    paper a masked weight keeps its value and may return; here it is zero, so its score stands still.
    https://arxiv.org/abs/2005.07683

    Example:
        >>> import torch
        >>> Movement().accumulate(torch.zeros(2), torch.tensor([2.0, 2.0]), torch.tensor([-1.0, 1.0]))
        tensor([ 2., -2.])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"movement"})

    def accumulate(self, movement: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
        """What has been added up after one more optimizer step; starts at zero."""
        return movement - full_precision(weight) * full_precision(grad)

    @override
    def __call__(self, evidence: Evidence) -> Tensor:
        return evidence.need("movement")


@dataclass(frozen=True)
class SoftMovement(Movement):
    """Score ``sigmoid(S)``, where ``S`` moves as in `Movement` and a penalty on ``sum(sigmoid(S))`` pulls it down.

    Sanh et al., 2020 (section 4, "soft movement pruning"): there the penalty and a fixed threshold decide how many
    weights go; here the budget does. Use it with ``scope="global"``, one threshold for all layers, as the paper has.
    https://arxiv.org/abs/2005.07683

    Args:
        penalty: weight of the penalty, not negative.
        lr: step size of the scores, above 0.

    Raises:
        ValueError: one of them is out of range.
    """

    penalty: float = 1e-3
    lr: float = 1e-2

    def __post_init__(self) -> None:
        if self.penalty < 0.0 or not self.lr > 0.0:
            raise ValueError(
                f"`SoftMovement(penalty={self.penalty}, lr={self.lr})`: expected penalty >= 0 and lr > 0. "
                "Usual is `SoftMovement(penalty=1e-3, lr=1e-2)`."
            )

    @override
    def accumulate(self, movement: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
        sigmoid = torch.sigmoid(movement)
        slope = full_precision(weight) * full_precision(grad) + self.penalty * sigmoid * (1.0 - sigmoid)
        return movement - self.lr * slope

    @override
    def __call__(self, evidence: Evidence) -> Tensor:
        return torch.sigmoid(evidence.need("movement"))
