"""Decompositions of one weight, done once, from which factors of any rank are read.

Weights are ``(groups, out, in, *kernel)``, with channels counted within a group.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

__all__ = ["MatrixSpectrum", "Spectrum", "TuckerSpectrum", "decompose"]

Ranks = tuple[int, ...]


class Spectrum(ABC):
    """One weight, decomposed in one form.

    Attributes:
        form: ``"linear"``, ``"embedding"``, ``"channel"``, ``"spatial"`` or ``"tucker2"``.
        full: the ranks at which nothing is lost.
        total: squared norm of the weight, in the norm of the fit.
    """

    form: str
    full: Ranks
    total: float

    @abstractmethod
    def errors(self) -> Tensor:
        """Squared error at every rank, ``errors()[r - 1]``; for two ranks ``errors()[r1 - 1, r2 - 1]``."""

    @abstractmethod
    def factors(self, ranks: Ranks) -> list[Tensor]:
        """The factors at ``ranks``, in the order in which they are applied."""

    def error(self, ranks: Ranks) -> float:
        """Share of the weight's energy that is lost at ``ranks``, in [0, 1]."""
        return float(self.errors()[tuple(rank - 1 for rank in ranks)]) / max(self.total, 1e-300)


class MatrixSpectrum(Spectrum):
    """The singular value decomposition of a matricized weight; optimal at every rank."""

    def __init__(self, form: str, weight: Tensor, weights: tuple[Tensor, Tensor] | None = None) -> None:
        self.form = form
        self._shape = weight.shape
        matrix = matricize(form, weight)
        self.shape = (matrix.shape[1], matrix.shape[2])
        if weights is None:
            self._inverse = None
            self._left, self._values, self._right = _svd(matrix)
        else:
            first, self._inverse = weights
            self._left, self._values, self._right = _svd(_apply(matrix.double(), first.to(matrix.device)))
        self.full = (self._values.shape[-1],)
        squares = self._values.double().square().sum(0)
        tails = squares.flip(0).cumsum(0).flip(0)
        self.total = float(squares.sum())
        self._errors = torch.cat([tails[1:], tails.new_zeros(1)])
        self._list: list[float] = self._errors.tolist()

    @property
    def values(self) -> Tensor:
        """Singular values, ``(groups, rank)``, in descending order."""
        return self._values

    @override
    def errors(self) -> Tensor:
        return self._errors

    @override
    def error(self, ranks: Ranks) -> float:
        return self._list[ranks[0] - 1] / max(self.total, 1e-300)

    @override
    def factors(self, ranks: Ranks) -> list[Tensor]:
        (rank,) = ranks
        root = self._values[:, :rank].sqrt()
        second = self._left[:, :, :rank] * root[:, None, :]
        first = root[:, :, None] * self._right[:, :rank]
        if self._inverse is not None:
            first, second = _balanced(_apply(first, self._inverse.to(first.device)), second)
        return _fold(self.form, first, second, self._shape)


class TuckerSpectrum(Spectrum):
    """Tucker-2: the higher-order SVD over inputs and outputs; improved by alternation when its factors are read.

    Kim et al., 2016, "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications".
    https://arxiv.org/abs/1511.06530. Alternation: De Lathauwer et al., 2000, "On the Best Rank-1 and Rank-(R1,...,RN)
    Approximation of Higher-Order Tensors".
    """

    form = "tucker2"

    def __init__(self, weight: Tensor, sweeps: int = 2) -> None:
        self._weight = weight.flatten(3)  # (groups, out, in, kernel)
        self._kernel = weight.shape[3:]
        self._sweeps = sweeps
        _, out, before, taps = self._weight.shape
        self.shapes = ((before, out * taps), (out, before * taps))
        self._inputs, self.input_values = _left_vectors(self._weight.transpose(1, 2).flatten(2))
        self._outputs, self.output_values = _left_vectors(self._weight.flatten(2))
        core = torch.einsum("goik,gop,giq->gqpk", self._weight, self._outputs, self._inputs)
        self.full = (self._inputs.shape[-1], self._outputs.shape[-1])
        energy = core.double().square().sum((0, 3))
        self.total = float(energy.sum())
        self._errors = (energy.sum() - energy.cumsum(0).cumsum(1)).clamp_min(0.0)

    @override
    def errors(self) -> Tensor:
        return self._errors

    @override
    def factors(self, ranks: Ranks) -> list[Tensor]:
        inputs, outputs = self._inputs[..., : ranks[0]], self._outputs[..., : ranks[1]]
        for _ in range(self._sweeps if ranks != self.full else 0):
            reduced = torch.einsum("goik,giq->goqk", self._weight, inputs)
            outputs = _left_vectors(reduced.flatten(2))[0][..., : ranks[1]]
            reduced = torch.einsum("goik,gop->gipk", self._weight, outputs)
            inputs = _left_vectors(reduced.flatten(2))[0][..., : ranks[0]]
        core = torch.einsum("goik,gop,giq->gpqk", self._weight, outputs, inputs)
        groups, after, before, _ = core.shape
        scale = _shared_scale(core)
        first = (inputs.mT * scale).reshape(groups * before, -1, *(1 for _ in self._kernel))
        last = (outputs * scale).reshape(-1, after, *(1 for _ in self._kernel))
        return [first, (core / scale**2).reshape(groups * after, before, *self._kernel), last]


def decompose(form: str, weight: Tensor, weights: tuple[Tensor, Tensor] | None = None) -> Spectrum:
    """Decompose ``weight`` in ``form``.

    Args:
        form: see `Spectrum`.
        weight: ``(groups, out, in, *kernel)``; an embedding is ``(1, words, width)``.
        weights: of a `Fit`, for the forms that keep all inputs in one axis: ``"linear"`` and ``"channel"``.

    Example:
        >>> weight = torch.randn(1, 6, 4, 3, 3)
        >>> [decompose(form, weight).full for form in ("channel", "spatial", "tucker2")]
        [(6,), (12,), (4, 6)]
    """
    weight = weight.detach()
    weight = weight if weight.dtype == torch.float64 else weight.float()
    return TuckerSpectrum(weight) if form == "tucker2" else MatrixSpectrum(form, weight, weights)


def matricize(form: str, weight: Tensor) -> Tensor:
    """The matrices ``(groups, rows, columns)`` whose rank the form lowers; columns are what the first factor reads."""
    if form == "embedding":
        return weight.mT
    if form == "spatial":  # rows: (out, x); columns: (in, y)
        return weight.permute(0, 1, 4, 2, 3).flatten(3).flatten(1, 2)
    return weight.flatten(2)


def _fold(form: str, first: Tensor, second: Tensor, shape: Sequence[int]) -> list[Tensor]:
    groups, out, inputs, *kernel = shape if form != "embedding" else (shape[0], shape[2], shape[1])
    rank = first.shape[1]
    if form == "embedding":
        return [first[0].mT.contiguous(), second[0]]
    if form == "linear":
        return [first[0], second[0]]
    if form == "spatial":
        vertical = first.reshape(groups * rank, inputs, kernel[0], 1)
        horizontal = second.reshape(groups, out, kernel[1], rank).transpose(2, 3)
        return [vertical, horizontal.reshape(groups * out, rank, 1, kernel[1])]
    ones = [1] * len(kernel)
    return [first.reshape(groups * rank, inputs, *kernel), second.reshape(groups * out, rank, *ones)]


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, values, right


def _left_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors and values, in descending order, of ``(groups, rows, columns)``; the wide axis is free."""
    if matrix.shape[1] <= matrix.shape[2]:
        _, triangle = torch.linalg.qr(matrix.mT, mode="r")  # R^T has the left vectors of the matrix, and is square
        matrix = triangle.mT
    left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    return left, values


def _apply(matrix: Tensor, weights: Tensor) -> Tensor:
    return matrix * weights if weights.shape[-2] == 1 and weights.shape[-1] > 1 else matrix @ weights


def _balanced(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The same product, from factors whose rows and columns have equal norms."""
    rows, columns = first.norm(dim=2), second.norm(dim=1)
    scale = (columns.clamp_min(1e-30) / rows.clamp_min(1e-30)).sqrt()
    return first * scale[:, :, None], second / scale[:, None, :]


def _shared_scale(core: Tensor) -> float:
    """What orthonormal factors are multiplied by so that all three have entries of the same size, roughly."""
    largest = float(core.abs().amax())
    return math.pow(largest, 1 / 3) if largest > 0.0 else 1.0
