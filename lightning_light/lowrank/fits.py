"""Norms in which a low-rank approximation is optimal: of the weight, of the outputs on data, or of the loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_light.validation import Fraction, NonNegativeFloat, validated

__all__ = ["ActivationSVD", "FisherSVD", "Fit", "WeightSVD", "WhitenedSVD"]

Evidence = Mapping[str, Tensor]
"""Kind of evidence -> tensor of one layer, ``(groups, ..., in)``, with inputs along the last axis."""

_TINY = 1e-8


class Fit(ABC):
    """Define the norm in which a low-rank approximation is optimal.

    For a matrix ``W`` of shape ``(out, in)`` the fit is the low-rank ``V`` that minimizes ``||(W - V) M||``.

    Attributes:
        needs: kinds of evidence, of ``"input_covariance"`` (mean of ``x x^T``), ``"input_absolute"`` (mean of ``|x|``)
            and ``"grad_squared"`` (mean squared gradient of the weight).
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def metric(self, evidence: Evidence) -> Tensor | None:
        """Return ``M M^T`` as ``(groups, in, in)``, or ``(groups, 1, in)`` if it is diagonal; None for the identity."""


@validated
@dataclass(frozen=True)
class WeightSVD(Fit):
    """Minimize the error of the weight itself (``M = I``); needs no data."""

    @override
    def metric(self, evidence: Evidence) -> Tensor | None:
        return None


@validated
@dataclass(frozen=True)
class WhitenedSVD(Fit):
    """Minimize the error of the layer's outputs on data: ``M M^T = E[x x^T]``.

    Wang et al., 2024, "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression".
    https://arxiv.org/abs/2403.07378. There a Cholesky factor is inverted; the closed form used here needs no
    inverse, and therefore holds for linearly dependent inputs too.

    Args:
        damping: fraction of the mean variance that is added to the variance of every input.

    Raises:
        ValueError: ``damping`` is negative.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"input_covariance"})

    damping: NonNegativeFloat = 1e-6

    @override
    def metric(self, evidence: Evidence) -> Tensor | None:
        covariance = evidence["input_covariance"].double()
        covariance = (covariance + covariance.mT) / 2
        mean = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(_TINY)
        return covariance + self.damping * mean * torch.eye(covariance.shape[-1]).to(covariance)


@validated
@dataclass(frozen=True)
class ActivationSVD(Fit):
    """Weight errors by the magnitude of the inputs: ``M = diag(E|x| ** alpha)``.

    Yuan et al., 2023, "ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models",
    eq. 5. https://arxiv.org/abs/2312.05821

    Args:
        alpha: in [0, 1]; 0.5 as in the paper. At 0 it is `WeightSVD`.

    Raises:
        ValueError: unless ``0 <= alpha <= 1``.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"input_absolute"})

    alpha: Fraction = 0.5

    @override
    def metric(self, evidence: Evidence) -> Tensor | None:
        return _diagonal(evidence["input_absolute"].double() ** (2 * self.alpha))


@validated
@dataclass(frozen=True)
class FisherSVD(Fit):
    """Weight errors by the Fisher information of the weights: ``M = diag(sqrt(sum over outputs of E[g^2]))``.

    Hsu et al., 2022, "Language model compression with weighted low-rank factorization", eq. 5 and 6.
    https://arxiv.org/abs/2207.00112
    """

    needs: ClassVar[frozenset[str]] = frozenset({"grad_squared"})

    @override
    def metric(self, evidence: Evidence) -> Tensor | None:
        return _diagonal(evidence["grad_squared"].double().sum(-2))


def _diagonal(squares: Tensor) -> Tensor:
    """Give inputs that were always zero a small positive value."""
    return squares.clamp_min(1e-12 * float(squares.max()) or 1.0)[..., None, :]
