"""Movement criteria: weights that training moves towards zero are removed first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_light.criteria.evidence import Criterion, Evidence, full_precision
from lightning_light.validation import NonNegativeFloat, PositiveFloat, validated

__all__ = ["Movement", "SoftMovement"]


@validated
@dataclass(frozen=True)
class Movement(Criterion):
    """Score ``-sum_t w_t * dL/dw_t`` over the optimizer steps: positive where training moves away from zero.

    Sanh et al., 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", for fine-tuning a trained network. In the
    paper a masked weight keeps its value and may return; here it is zero, so its score stays constant.
    https://arxiv.org/abs/2005.07683

    Example:
        >>> import torch
        >>> Movement().accumulate(torch.zeros(2), torch.tensor([2.0, 2.0]), torch.tensor([-1.0, 1.0]))
        tensor([ 2., -2.])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"movement"})

    def accumulate(self, movement: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
        """Add one optimizer step to ``movement``, which starts at zero."""
        return movement - full_precision(weight) * full_precision(grad)

    @override
    def __call__(self, evidence: Evidence) -> Tensor:
        return evidence.need("movement")


@validated
@dataclass(frozen=True)
class SoftMovement(Movement):
    """Score ``sigmoid(S)``, where ``S`` accumulates as in `Movement` and a penalty on ``sum(sigmoid(S))`` lowers it.

    Sanh et al., 2020 (section 4, "soft movement pruning"): there the penalty and a fixed threshold decide how many
    weights are removed; here the budget does. Use it with ``scope="global"``: one threshold for all layers,
    as in the paper.
    https://arxiv.org/abs/2005.07683

    Args:
        penalty: weight of the penalty, not negative.
        lr: step size of the scores, above 0.

    Raises:
        ValueError: one of them is out of range.
    """

    penalty: NonNegativeFloat = 1e-3
    lr: PositiveFloat = 1e-2

    @override
    def accumulate(self, movement: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
        sigmoid = torch.sigmoid(movement)
        slope = full_precision(weight) * full_precision(grad) + self.penalty * sigmoid * (1.0 - sigmoid)
        return movement - self.lr * slope

    @override
    def __call__(self, evidence: Evidence) -> Tensor:
        return torch.sigmoid(evidence.need("movement"))
