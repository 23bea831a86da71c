"""Gradient-based criteria: the change of the loss without a weight, from its Taylor expansion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_light.criteria.evidence import Criterion, Evidence, full_precision
from lightning_light.validation import validated

__all__ = ["SNIP", "Hessian", "Taylor"]


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
