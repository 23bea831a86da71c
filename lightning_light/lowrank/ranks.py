"""Rules that choose the ranks of one layer at a time from its singular values."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_light.lowrank.spectra import Ranks, Spectrum
from lightning_light.validation import FractionBelowOne, OpenFraction, PositiveFloat, validated

__all__ = ["EVBMF", "RetainedEnergy", "OutputChange", "RankRatio", "RankRule", "evbmf_rank", "rounded"]

Measure = Callable[[Ranks], float]


class RankRule(ABC):
    """Choose the ranks of one layer from its spectrum, before they are rounded.

    Attributes:
        measures: whether it reads how much the network's output changes, which needs calibration batches.
    """

    measures: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, spectrum: Spectrum, measure: Measure | None) -> Ranks:
        """Return the ranks to keep.

        Args:
            spectrum: of the layer's weight.
            measure: ranks -> relative squared change of the network's output with this layer alone factorized.
        """


@validated
@dataclass(frozen=True)
class RetainedEnergy(RankRule):
    """Keep the smallest ranks that retain ``fraction`` of the squared norm of the weight.

    Args:
        fraction: in (0, 1].

    Raises:
        ValueError: unless ``0 < fraction <= 1``.
    """

    fraction: OpenFraction = 0.95

    @override
    def __call__(self, spectrum: Spectrum, measure: Measure | None) -> Ranks:
        return _smallest(spectrum, spectrum.errors <= (1.0 - self.fraction + 1e-12) * spectrum.total)


@validated
@dataclass(frozen=True)
class RankRatio(RankRule):
    """Keep the same fraction of the full rank in every layer.

    Args:
        ratio: in (0, 1].

    Raises:
        ValueError: unless ``0 < ratio <= 1``.
    """

    ratio: OpenFraction = 0.25

    @override
    def __call__(self, spectrum: Spectrum, measure: Measure | None) -> Ranks:
        return tuple(max(1, round(self.ratio * full)) for full in spectrum.full)


@validated
@dataclass(frozen=True)
class EVBMF(RankRule):
    """Keep the singular values above the noise level found by empirical variational Bayes, which has no parameter.

    Nakajima et al., 2013, "Global Analytic Solution of Fully-observed Variational Bayesian Matrix Factorization",
    JMLR 14, theorem 2 and 3. https://jmlr.org/papers/v14/nakajima13a.html. The two ranks of
    Tucker-2 are those of both unfoldings, as in Kim et al., 2016. https://arxiv.org/abs/1511.06530

    Args:
        weaken: in [0, 1): fraction of the removed ranks that is kept after all.

    Raises:
        ValueError: unless ``0 <= weaken < 1``.
    """

    weaken: FractionBelowOne = 0.0

    @override
    def __call__(self, spectrum: Spectrum, measure: Measure | None) -> Ranks:
        found = [max(evbmf_rank(values, *shape) for values in group) for group, shape in spectrum.unfoldings]
        pairs = zip(found, spectrum.full, strict=True)
        return tuple(max(1, round(rank + self.weaken * (full - rank))) for rank, full in pairs)


@validated
@dataclass(frozen=True)
class OutputChange(RankRule):
    """Keep the smallest ranks at which the layer alone changes the network's output by at most ``limit``.

    The change is ``||y - y'||^2 / ||y||^2`` on the calibration batches; the rank is found by bisection, with
    the two ranks of Tucker-2 in proportion.

    Args:
        limit: above 0.

    Raises:
        ValueError: ``limit`` is not above 0.
    """

    measures: ClassVar[bool] = True

    limit: PositiveFloat = 0.01

    @override
    def __call__(self, spectrum: Spectrum, measure: Measure | None) -> Ranks:
        assert measure is not None  # promised by `measures`
        low, high = 1, max(spectrum.full)
        while low < high:
            middle = (low + high) // 2
            if measure(_in_proportion(spectrum.full, middle)) <= self.limit:
                high = middle
            else:
                low = middle + 1
        return _in_proportion(spectrum.full, high)


def rounded(ranks: Ranks, full: Ranks, step: int) -> Ranks:
    """Round ranks up to the next multiple of ``step``, at most to the full rank.

    Example:
        >>> rounded((5, 30), full=(12, 32), step=8)
        (8, 32)
    """
    return tuple(min(limit, math.ceil(rank / step) * step) for rank, limit in zip(ranks, full, strict=True))


def evbmf_rank(values: Tensor, rows: int, columns: int) -> int:
    """Count the singular values ``values`` of a ``rows x columns`` matrix that are above the noise level.

    The noise variance is the one that minimizes the free energy, eq. 37 to 42 of Nakajima et al., 2013.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> signal = torch.randn(60, 3, generator=generator) @ torch.randn(3, 80, generator=generator)
        >>> noisy = signal + 0.3 * torch.randn(60, 80, generator=generator)
        >>> evbmf_rank(torch.linalg.svdvals(noisy), 60, 80)
        3
    """
    short, long = min(rows, columns), max(rows, columns)
    squares = values.double().square()
    if float(squares.sum()) <= 0.0:
        return 0
    alpha = short / long
    tau = 2.5129 * math.sqrt(alpha)
    bound = (1 + tau) * (1 + alpha / tau)
    kept = len(squares)
    last = max(min(math.ceil(short / (1 + alpha)) - 1, kept) - 1, 0)
    rest = squares[last + 1 :]
    high = float(squares.sum()) / (short * long)
    low = max(float(rest[0]) / (long * bound), float(rest.mean()) / long) if len(rest) else 1e-12 * high
    low = min(max(low, 1e-12 * high), high)

    def energy(variance: float) -> float:
        unseen = (short - kept) * math.log(variance)  # values that were not given are zero
        return _free_energy(squares / (long * variance), alpha, bound) + unseen

    variance = _minimum(energy, low, high)
    return int((squares > long * variance * bound).sum())


def _free_energy(x: Tensor, alpha: float, bound: float) -> float:
    """Compute eq. 41 and 42 without the term in the logarithm of the variance."""
    large, small = x[x > bound], x[x <= bound].clamp_min(1e-300)
    tau = 0.5 * (large - (1 + alpha) + ((large - (1 + alpha)).square() - 4 * alpha).clamp_min(0.0).sqrt())
    terms = [
        (small - small.log()).sum(),
        (large - tau).sum(),
        ((tau + 1) / large).log().sum(),
        alpha * (tau / alpha + 1).log().sum(),
    ]
    return float(torch.stack(terms).sum())


def _minimum(function: Callable[[float], float], low: float, high: float) -> float:
    """Minimize a function with several minima: a logarithmic grid, then golden-section search around its best point."""
    grid: list[float] = [low * (high / low) ** (place / 63) for place in range(64)]
    best = min(range(len(grid)), key=lambda place: function(grid[place]))
    left, right = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        a, b = right - ratio * (right - left), left + ratio * (right - left)
        left, right = (left, b) if function(a) < function(b) else (a, right)
    return (left + right) / 2


def _smallest(spectrum: Spectrum, good: Tensor) -> Ranks:
    """Return the ranks with the smallest sum at which ``good`` holds; it holds at full rank."""
    good = good.clone()
    good[tuple(full - 1 for full in spectrum.full)] = True
    places = good.nonzero()
    return tuple(int(place) + 1 for place in places[places.sum(1).argmin()])


def _in_proportion(full: Ranks, largest: int) -> Ranks:
    return tuple(max(1, math.ceil(largest * rank / max(full))) for rank in full)
