"""Gradient-based criteria: the change of the loss without a weight, and the movement of weights in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_light.criteria.evidence import Criterion, Evidence, full_precision
from lightning_light.validation import NonNegativeFloat, PositiveFloat, validated

__all__ = ["SNIP", "Hessian", "Movement", "SoftMovement", "Taylor"]


@validated
@dataclass(frozen=True)
class Taylor(Criterion):
    """Score ``(w * dL/dw) ** 2``: the squared first-order change of the loss.

    Molchanov et al., 2019, "Importance Estimation for Neural Network Pruning"; a filter's score is the sum over
    its weights. The gradient here is the mean over the gathered batches; the paper averages the scores of
    mini-batches instead, which adds the variance of the gradient (that is `Hessian`, up to a factor of two).
    https://arxiv.org/abs/1906.10771

    Example:
        >>> import torch
        >>> Taylor()(Evidence(torch.tensor([2.0, 1.0]), grad=torch.tensor([0.5, -3.0])))
        tensor([1., 9.])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"grad"})

    @override
    def __call__(self, evidence: Evidence) -> Tensor:
        return (full_precision(evidence.weight) * evidence.need("grad")) ** 2


@validated
@dataclass(frozen=True)
class Hessian(Criterion):
    """Score ``w**2 * E[(dL/dw)**2] / 2``: the second-order change of the loss at a minimum.

    LeCun et al., 1989, "Optimal Brain Damage" (``h * w**2 / 2`` with the diagonal ``h`` of the Hessian),
    https://proceedings.neurips.cc/paper/1989/hash/6c9882bbac1c7093bd25041881277658-Abstract.html. The diagonal is
    estimated by the empirical Fisher information, as in Theis et al., 2018, "Faster gaze prediction with dense networks
    and Fisher pruning", https://arxiv.org/abs/1801.05787; gradients of batches replace those of single samples.

    Example:
        >>> import torch
        >>> Hessian()(Evidence(torch.tensor([2.0, 1.0]), grad_squared=torch.tensor([0.5, 4.0])))
        tensor([1., 2.])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"grad_squared"})

    @override
    def __call__(self, evidence: Evidence) -> Tensor:
        return full_precision(evidence.weight) ** 2 * evidence.need("grad_squared") / 2.0


@validated
@dataclass(frozen=True)
class SNIP(Criterion):
    """Score ``|w * dL/dw|``: the sensitivity of the loss to the connection.

    Lee et al., 2019, "SNIP: Single-shot Network Pruning based on Connection Sensitivity". The paper divides by the sum
    over all weights, which changes no order, and prunes once, before training. https://arxiv.org/abs/1810.02340

    Example:
        >>> import torch
        >>> SNIP()(Evidence(torch.tensor([2.0, 1.0]), grad=torch.tensor([0.5, -3.0])))
        tensor([1., 3.])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"grad"})

    @override
    def __call__(self, evidence: Evidence) -> Tensor:
        return (full_precision(evidence.weight) * evidence.need("grad")).abs()


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
