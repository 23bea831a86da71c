"""Decompose a weight once, and read factors of any rank from the decomposition.

Weights are ``(groups, out, in, *kernel)``, with channels counted within a group.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

__all__ = [
    "DEPTHWISE",
    "MatrixSpectrum",
    "Ranks",
    "Spectrum",
    "TuckerSpectrum",
    "decompose",
    "factor_shapes",
    "full_ranks",
]

Ranks = tuple[int, ...]

DEPTHWISE = ("depthwise", "pointwise")
"""Forms of a depthwise and a pointwise layer, by which comes first; the rank is the number of pairs per channel."""


class Spectrum(ABC):
    """Decomposition of one weight in one form.

    Attributes:
        form: ``"linear"``, ``"embedding"``, ``"channel"``, ``"spatial"``, ``"tucker2"``, ``"depthwise"``
            or ``"pointwise"``.
        full: the ranks at which the factors are exact.
        total: squared norm of the weight, in the norm of the fit.
        errors: squared error at every rank, ``errors[r - 1]``; for two ranks ``errors[r1 - 1, r2 - 1]``.
        unfoldings: for every rank, the singular values ``(groups, values)`` of a matrix, and its shape.
    """

    form: str
    full: Ranks
    total: float
    errors: Tensor
    unfoldings: list[tuple[Tensor, tuple[int, int]]]

    @abstractmethod
    def factors(self, ranks: Ranks) -> list[Tensor]:
        """Return the factors at ``ranks``, in the order in which they are applied."""

    def error(self, ranks: Ranks) -> float:
        """Return the fraction of the weight's energy that is lost at ``ranks``, in [0, 1]."""
        return float(self.relative_errors()[tuple(rank - 1 for rank in ranks)])

    def relative_errors(self) -> Tensor:
        """Return `errors` as fractions of the weight's energy."""
        return self.errors / max(self.total, 1e-300)


class MatrixSpectrum(Spectrum):
    """Singular value decomposition of a matricized weight; optimal at every rank.

    The best matrix of rank r is ``U U^T W`` with the first r left singular vectors ``U``, in any norm ``||. M||``
    (Eckart and Young, 1936), so that no inverse of ``M`` is needed, and ``U`` comes from the small ``W M M^T W^T``.
    That is several times faster than decomposing ``W`` itself, and as exact as single precision can represent.
    """

    def __init__(self, form: str, weight: Tensor, metric: Tensor | None = None) -> None:
        self.form = form
        self._kept = weight.shape, weight.dtype
        matrix = matricize(form, weight)
        matrix = matrix if metric is None else matrix.double()
        self.shape = (matrix.shape[1], matrix.shape[2])
        is_tall = self.shape[0] > self.shape[1]
        self._flipped = is_tall and metric is None  # the right singular vectors are then the smaller problem
        self._matrix = matrix.mT if self._flipped else matrix
        if is_tall and metric is not None:
            outer, inner = torch.linalg.qr(matrix)
            vectors, values = _left_vectors(inner, metric)
            self._vectors = outer @ vectors
        else:
            self._vectors, values = _left_vectors(self._matrix, metric)
        self.unfoldings = [(values, self.shape)]
        self.full = full_ranks(form, weight.shape)
        squares = values.square().sum(0)
        tails = squares.flip(0).cumsum(0).flip(0)
        self.total = float(squares.sum())
        self.errors = torch.cat([tails[1:], tails.new_zeros(1)])

    @override
    def factors(self, ranks: Ranks) -> list[Tensor]:
        (rank,) = ranks
        vectors = self._vectors[:, :, :rank]
        rest = vectors.mT @ self._matrix
        first, second = _balanced(*((vectors.mT, rest.mT) if self._flipped else (rest, vectors)))
        shape, dtype = self._kept
        return _fold(self.form, first.to(dtype), second.to(dtype), shape)


class TuckerSpectrum(Spectrum):
    """Tucker-2 decomposition: the higher-order SVD over inputs and outputs, refined by alternation.

    Kim et al., 2016, "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications".
    https://arxiv.org/abs/1511.06530. Alternation: De Lathauwer et al., 2000, "On the Best Rank-1 and Rank-(R1,...,RN)
    Approximation of Higher-Order Tensors".
    """

    form = "tucker2"

    def __init__(self, weight: Tensor) -> None:
        self._shape, self._dtype = weight.shape, weight.dtype
        tensor = weight.flatten(3)
        groups, self._out, self._in, kernel_size = tensor.shape
        self._by_out = tensor.transpose(2, 3).reshape(groups, -1, self._in)  # rows: (out, kernel)
        self._by_in = tensor.permute(0, 2, 3, 1).reshape(groups, -1, self._out)  # rows: (in, kernel)
        self._inputs, of_inputs = _left_vectors(self._by_in.reshape(groups, self._in, -1))
        self._outputs, of_outputs = _left_vectors(self._by_out.reshape(groups, self._out, -1))
        shapes = (self._in, self._out * kernel_size), (self._out, self._in * kernel_size)
        self.unfoldings = [(of_inputs, shapes[0]), (of_outputs, shapes[1])]
        self.full = full_ranks(self.form, weight.shape)
        core = self._outputs.mT @ self._reduced(self._inputs)
        energy = core.square().sum(0).reshape(self.full[1], kernel_size, self.full[0]).sum(1).mT
        self.total = float(energy.sum())
        self.errors = (energy.sum() - energy.cumsum(0).cumsum(1)).clamp_min(0.0)

    @override
    def factors(self, ranks: Ranks) -> list[Tensor]:
        inputs, outputs = self._inputs[..., : ranks[0]], self._outputs[..., : ranks[1]]
        reduced = self._reduced(inputs)
        if ranks != self.full:
            outputs = _left_vectors(reduced)[0][..., : ranks[1]]
            other = (self._by_in @ outputs).reshape(len(outputs), self._in, -1)
            inputs = _left_vectors(other)[0][..., : ranks[0]]
            reduced = self._reduced(inputs)
        core = (outputs.mT @ reduced).reshape(*reduced.shape[:1], ranks[1], -1, ranks[0]).transpose(2, 3)
        scale = _shared_scale(core)
        shapes = factor_shapes(self.form, self._shape, ranks)
        pieces = inputs.mT * scale, core / scale**2, outputs * scale
        return [piece.reshape(shape).to(self._dtype) for piece, shape in zip(pieces, shapes, strict=True)]

    def _reduced(self, inputs: Tensor) -> Tensor:
        """Return the weight with its inputs projected: ``(groups, out, kernel * rank)``."""
        return (self._by_out @ inputs).reshape(len(inputs), self._out, -1)


def decompose(form: str, weight: Tensor, metric: Tensor | None = None) -> Spectrum:
    """Decompose ``weight`` in ``form``.

    Args:
        form: see `Spectrum`.
        weight: ``(groups, out, in, *kernel)``; an embedding is ``(1, words, width)``.
        metric: of a `Fit`, for the forms that keep all inputs in one axis: ``"linear"`` and ``"channel"``.

    Example:
        >>> weight = torch.randn(1, 6, 4, 3, 3)
        >>> [decompose(form, weight).full for form in ("channel", "spatial", "tucker2")]
        [(6,), (12,), (4, 6)]
    """
    weight = weight.detach()
    weight = weight if weight.dtype == torch.float64 else weight.float()
    return TuckerSpectrum(weight) if form == "tucker2" else MatrixSpectrum(form, weight, metric)


def full_ranks(form: str, shape: Sequence[int]) -> Ranks:
    """Return the ranks at which a weight of ``shape`` ``(groups, out, in, *kernel)`` is represented exactly.

    Example:
        >>> [full_ranks(form, (1, 6, 4, 3, 3)) for form in ("channel", "spatial", "tucker2")]
        [(6,), (12,), (4, 6)]
    """
    _, out, inputs, *kernel = shape
    if form == "tucker2":
        size = math.prod(kernel)
        return min(inputs, out * size), min(out, inputs * size)
    if form in DEPTHWISE:
        return (min(out if form == "depthwise" else inputs, math.prod(kernel)),)
    if form == "spatial":
        return (min(out * kernel[1], inputs * kernel[0]),)
    return (min(out, inputs * math.prod(kernel)),)


def factor_shapes(form: str, shape: Sequence[int], ranks: Ranks) -> list[tuple[int, ...]]:
    """Return the shapes of the factors of a weight of ``shape``, in the order in which they are applied.

    Example:
        >>> factor_shapes("tucker2", (1, 6, 4, 3, 3), (2, 5))
        [(2, 4, 1, 1), (5, 2, 3, 3), (6, 5, 1, 1)]
    """
    groups, out, inputs, *kernel = shape
    ones = [1] * len(kernel)
    if form == "tucker2":
        before, after = ranks
        middle = (groups * after, before, *kernel)
        return [(groups * before, inputs, *ones), middle, (groups * out, after, *ones)]
    (rank,) = ranks
    if form == "embedding":
        return [(out, rank), (inputs, rank)]
    if form == "spatial":
        return [(groups * rank, inputs, kernel[0], 1), (groups * out, rank, 1, kernel[1])]
    if form == "depthwise":
        return [(inputs * rank, 1, *kernel), (out, inputs * rank, *ones)]
    if form == "pointwise":
        return [(out * rank, inputs, *ones), (out, rank, *kernel)]
    return [(groups * rank, inputs, *kernel), (groups * out, rank, *ones)]


def matricize(form: str, weight: Tensor) -> Tensor:
    """Return the matrices ``(groups, rows, columns)`` of reduced rank; the first factor reads the columns."""
    if form == "embedding":
        return weight.mT
    if form == "depthwise":  # of each input; rows: out; columns: kernel
        return weight[0].flatten(2).transpose(0, 1)
    if form == "pointwise":  # of each output; rows: kernel; columns: in
        return weight[0].flatten(2).transpose(1, 2)
    if form == "spatial":  # rows: (out, x); columns: (in, y)
        return weight.permute(0, 1, 4, 2, 3).flatten(3).flatten(1, 2)
    return weight.flatten(2)


def _fold(form: str, first: Tensor, second: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """Return the factors of the matrices of `matricize` in the shapes of `factor_shapes`."""
    rank = first.shape[1]
    if form == "embedding":
        first = first.mT
    elif form == "spatial":
        second = second.reshape(*shape[:2], shape[4], rank).transpose(2, 3)
    elif form == "depthwise":
        second = second.transpose(0, 1)
    elif form == "pointwise":
        second = second.mT
    pieces = zip((first, second), factor_shapes(form, shape, (rank,)), strict=True)
    return [piece.reshape(shape).contiguous() for piece, shape in pieces]


def _left_vectors(matrix: Tensor, metric: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute left singular vectors and values of ``W M``, in descending order, from ``W M M^T W^T``."""
    gram = (matrix if metric is None else _apply(matrix, metric.to(matrix))) @ matrix.mT
    values, vectors = torch.linalg.eigh(gram)
    count = min(matrix.shape[1:])
    return vectors.flip(-1)[..., :count], values.flip(-1)[..., :count].clamp_min(0.0).sqrt()


def _apply(matrix: Tensor, metric: Tensor) -> Tensor:
    return matrix * metric if metric.shape[-2] == 1 and metric.shape[-1] > 1 else matrix @ metric


def _balanced(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Scale two factors so that rows and columns have equal norms; their product stays the same."""
    rows, columns = first.norm(dim=2), second.norm(dim=1)
    scale = (columns.clamp_min(1e-30) / rows.clamp_min(1e-30)).sqrt()
    return first * scale[:, :, None], second / scale[:, None, :]


def _shared_scale(core: Tensor) -> float:
    """Return the scale of orthonormal factors at which all three have entries of about the same size."""
    largest = float(core.abs().amax())
    return math.pow(largest, 1 / 3) if largest > 0.0 else 1.0
