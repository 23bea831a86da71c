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
    """Says which errors of a matrix count: those along inputs that matter.

    For a matrix ``W`` of shape ``(out, in)`` the fit is the best low-rank ``V`` in ``||(W - V) M||``, for some ``M``.

    Attributes:
        needs: kinds of evidence, of ``"moment"`` (mean of ``x x^T``), ``"absolute"`` (mean of ``|x|``) and
            ``"grad_squared"`` (mean squared gradient of the weight).
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def metric(self, evidence: Evidence) -> Tensor | None:
        """``M M^T``, as ``(groups, in, in)``, or as ``(groups, 1, in)`` if it is diagonal; None for the identity."""


@dataclass(frozen=True)
class WeightSVD(Fit):
    """The nearest matrix of a rank, by its entries alone: no data are needed."""

    @override
    def metric(self, evidence: Evidence) -> Tensor | None:
        return None


@dataclass(frozen=True)
class WhitenedSVD(Fit):
    """The matrix whose outputs are nearest on the data: ``M M^T = E[x x^T]``.

    Wang et al., 2024, "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression".
    https://arxiv.org/abs/2403.07378. There a Cholesky factor is taken and inverted; the closed form used here needs
    neither, and so also holds where inputs depend on each other.

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
    def metric(self, evidence: Evidence) -> Tensor | None:
        moment = evidence["moment"].double()
        moment = (moment + moment.mT) / 2
        mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(_TINY)
        return moment + self.damping * mean * torch.eye(moment.shape[-1]).to(moment)


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
    def metric(self, evidence: Evidence) -> Tensor | None:
        return _diagonal(evidence["absolute"].double() ** (2 * self.alpha))


@dataclass(frozen=True)
class FisherSVD(Fit):
    """Inputs count by what the loss says of their weights: ``M = diag(sqrt(sum over outputs of E[g^2]))``.

    Hsu et al., 2022, "Language model compression with weighted low-rank factorization", eq. 5 and 6.
    https://arxiv.org/abs/2207.00112
    """

    needs: ClassVar[frozenset[str]] = frozenset({"grad_squared"})

    @override
    def metric(self, evidence: Evidence) -> Tensor | None:
        return _diagonal(evidence["grad_squared"].double().sum(-2))


def _diagonal(squares: Tensor) -> Tensor:
    """An input that was always silent still counts a little."""
    return squares.clamp_min(1e-12 * float(squares.max()) or 1.0)[..., None, :]
