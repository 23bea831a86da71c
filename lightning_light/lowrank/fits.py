"""Which low-rank matrix is the nearest: plainly, for the data that pass, or for the loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

__all__ = ["ActivationSVD", "FisherSVD", "Fit", "WeightSVD", "WhitenedSVD"]

Evidence = Mapping[str, Tensor]
"""Kind of evidence -> what was gathered for one layer, ``(groups, ..., in)``: inputs along the last axis."""

_TINY = 1e-8


class Fit(ABC):
    """Weighs the input axis of a matrix before its singular value decomposition, and takes the weight back after it.

    For a matrix ``W`` of shape ``(out, in)`` and a weight ``M`` the fit is the best low-rank ``V`` in
    ``||(W - V) M||``: ``V = svd(W M)`` cut to its rank, times the inverse of ``M`` (Eckart and Young, 1936).

    Attributes:
        needs: kinds of evidence, of ``"moment"`` (mean of ``x x^T``), ``"absolute"`` (mean of ``|x|``) and
            ``"grad_squared"`` (mean squared gradient of the weight).
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def weights(self, evidence: Evidence) -> tuple[Tensor, Tensor] | None:
        """``M`` and its inverse, each ``(groups, in, in)``, or ``(groups, 1, in)`` for a diagonal; None for none."""


@dataclass(frozen=True)
class WeightSVD(Fit):
    """The nearest matrix of a rank, by its entries alone: no data are needed."""

    @override
    def weights(self, evidence: Evidence) -> tuple[Tensor, Tensor] | None:
        return None


@dataclass(frozen=True)
class WhitenedSVD(Fit):
    """The matrix whose outputs are nearest on the data: ``M M^T = E[x x^T]``.

    Wang et al., 2024, "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression".
    https://arxiv.org/abs/2403.07378. There ``M`` is a Cholesky factor; here it is the symmetric root, which also
    exists where inputs depend on each other, and gives the same fit.

    Args:
        damping: share of the mean variance that is added to every input's.

    Raises:
        ValueError: ``damping`` is negative.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"moment"})

    damping: float = 1e-6

    def __post_init__(self) -> None:
        if self.damping < 0.0:
            raise ValueError(f"`WhitenedSVD(damping={self.damping})`: expected a share >= 0, such as 1e-6.")

    @override
    def weights(self, evidence: Evidence) -> tuple[Tensor, Tensor] | None:
        moment = evidence["moment"].double()
        moment = (moment + moment.mT) / 2
        mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(_TINY)
        values, vectors = torch.linalg.eigh(moment + self.damping * mean * torch.eye(moment.shape[-1]).to(moment))
        roots = values.clamp_min(0.0).sqrt()
        least = roots.amax(-1, keepdim=True) * 1e-10
        inverse = torch.where(roots > least, 1.0 / roots.clamp_min(_TINY * _TINY), 0.0)
        return (vectors * roots[..., None, :]) @ vectors.mT, (vectors * inverse[..., None, :]) @ vectors.mT


@dataclass(frozen=True)
class ActivationSVD(Fit):
    """Inputs count by their size: ``M = diag(E|x| ** alpha)``.

    Yuan et al., 2023, "ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models",
    eq. 5. https://arxiv.org/abs/2312.05821

    Args:
        alpha: in [0, 1]; 0.5 as in the paper. At 0 it is `WeightSVD`.

    Raises:
        ValueError: unless ``0 <= alpha <= 1``.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"absolute"})

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"`ActivationSVD(alpha={self.alpha})`: expected 0 <= alpha <= 1, such as 0.5.")

    @override
    def weights(self, evidence: Evidence) -> tuple[Tensor, Tensor] | None:
        return _diagonal(evidence["absolute"].double() ** self.alpha)


@dataclass(frozen=True)
class FisherSVD(Fit):
    """Inputs count by what the loss says of their weights: ``M = diag(sqrt(sum over outputs of E[g^2]))``.

    Hsu et al., 2022, "Language model compression with weighted low-rank factorization", eq. 5 and 6.
    https://arxiv.org/abs/2207.00112
    """

    needs: ClassVar[frozenset[str]] = frozenset({"grad_squared"})

    @override
    def weights(self, evidence: Evidence) -> tuple[Tensor, Tensor] | None:
        return _diagonal(evidence["grad_squared"].double().sum(-2).sqrt())


def _diagonal(scale: Tensor) -> tuple[Tensor, Tensor]:
    """An input that was always silent keeps a small weight, so that the inverse exists."""
    scale = scale.clamp_min(1e-6 * float(scale.max()) or 1.0)[..., None, :]
    return scale, 1.0 / scale
