"""Observers: find the range to which an activation is quantized."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor
from typing_extensions import override

from lightning_light.encoding import Extensible
from lightning_light.validation import OpenFraction, Range, validated

__all__ = ["DynamicObserver", "LSQObserver", "MSEObserver", "MinMax", "MovingAverage", "Observer", "Percentile"]

_BINS = 2048
_CANDIDATES = 64


class Observer(Extensible, ABC):
    """Find the range of an activation; a frozen dataclass.

    A subclass looks at one batch. Its ``momentum`` decides how batches, and processes, are combined: as a moving
    average in which a new batch has that weight, or, where it is None, as the widest range of all.
    """

    momentum: float | None

    @classmethod
    @override
    def kind(cls) -> str:
        return cls.__name__ if cls.__module__ == __name__ else super().kind()

    @abstractmethod
    def range_of(self, x: Tensor, quant_max: int, non_negative: bool) -> Tensor:
        """Return the smallest and the largest value of the quantized range for one batch, shape ``(2,)``.

        Args:
            x: not empty, without a gradient, in float32 or finer.
            quant_max: the largest quantized value; the smallest is 0.
            non_negative: whether the range begins at zero.
        """


class _Extremes(Observer):
    @override
    def range_of(self, x: Tensor, quant_max: int, non_negative: bool) -> Tensor:
        return torch.stack(torch.aminmax(x))


@validated
@dataclass(frozen=True)
class MovingAverage(_Extremes):
    """The smallest and the largest value of each batch, averaged over batches.

    Jacob et al., 2018, section 3.1. https://arxiv.org/abs/1712.05877

    Args:
        momentum: weight of a new batch, in (0, 1].

    Raises:
        ValueError: ``momentum`` out of range.
    """

    momentum: OpenFraction = 0.01


@validated
@dataclass(frozen=True)
class MinMax(_Extremes):
    """The smallest and the largest value of all batches: nothing that was observed is clipped."""

    momentum: None = field(default=None, init=False, repr=False)


@validated
@dataclass(frozen=True)
class Percentile(Observer):
    """The range that holds a fraction of a batch's values at each end, from a histogram of 2048 bins.

    McKinstry et al., 2018, "Discovering Low-Precision Networks Close to Full-Precision Networks for Efficient
    Embedded Inference". https://arxiv.org/abs/1809.04191

    Args:
        fraction: of the values that are below the upper end, and above the lower; in (0.5, 1).
        momentum: weight of a new batch in the moving average, in (0, 1].

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> Percentile(0.9).range_of(torch.linspace(0.0, 10.0, 1001), 255, True).round(decimals=1)
        tensor([1., 9.])
    """

    fraction: Annotated[float, Range(0.5, 1.0, above=True, below=True)] = 0.999
    momentum: OpenFraction = 0.01

    @override
    def range_of(self, x: Tensor, quant_max: int, non_negative: bool) -> Tensor:
        counts, edges = _histogram(x)
        below = counts.double().cumsum(0) / x.numel()
        ends = torch.tensor([1.0 - self.fraction, self.fraction], device=x.device, dtype=below.dtype)
        places = torch.searchsorted(below, ends)
        return torch.stack([edges[places[0]], edges[places[1] + 1]])


@validated
@dataclass(frozen=True)
class MSEObserver(Observer):
    """The range with the smallest mean squared quantization error of a batch.

    Searched among 64 ranges that shrink from the batch's own, on a histogram of 2048 bins.

    Choukroun et al., 2019, "Low-bit Quantization of Neural Networks for Efficient Inference", equation 5.
    https://arxiv.org/abs/1902.06822

    Args:
        momentum: weight of a new batch in the moving average, in (0, 1].

    Raises:
        ValueError: ``momentum`` out of range.
    """

    momentum: OpenFraction = 0.01

    @override
    def range_of(self, x: Tensor, quant_max: int, non_negative: bool) -> Tensor:
        counts, edges = _histogram(x)
        center = ((edges[1:] + edges[:-1]) / 2).double()
        shrink = torch.linspace(1.0 / _CANDIDATES, 1.0, _CANDIDATES, device=x.device, dtype=torch.float64)[:, None]
        low = (edges[0].double() * (0.0 if non_negative else 1.0)).clamp_max(0.0) * shrink
        top = edges[-1].double().clamp_min(0.0) * shrink
        scale = ((top - low) / quant_max).clamp_min(1e-12)
        zero_point = (-low / scale).round()
        quantized = ((center / scale).round() + zero_point).clamp(0, quant_max).sub(zero_point).mul(scale)
        best = (counts.double() * (quantized - center).square()).sum(1).argmin()
        return torch.cat([low[best], top[best]]).to(edges.dtype)


@validated
@dataclass(frozen=True)
class DynamicObserver(_Extremes):
    """Dynamic quantization: no range is kept, each forward pass uses that of the tensor itself."""

    momentum: None = field(default=None, init=False, repr=False)


@validated
@dataclass(frozen=True)
class LSQObserver(MSEObserver):
    """The range of the scale that `LSQ` begins with: that of `MSEObserver`, around zero for signed values.

    Esser et al., 2020, section 2.1, begin with the scale ``2 * mean|x| / sqrt(quant_max)``, whose error is larger.
    https://arxiv.org/abs/1902.08153

    Args:
        momentum: weight of a new batch in the moving average, in (0, 1].

    Raises:
        ValueError: ``momentum`` is out of range.
    """

    momentum: OpenFraction = 0.1

    @override
    def range_of(self, x: Tensor, quant_max: int, non_negative: bool) -> Tensor:
        both = x if non_negative else torch.cat([x.flatten(), -x.flatten()])
        return super().range_of(both, quant_max, non_negative)


def _histogram(x: Tensor) -> tuple[Tensor, Tensor]:
    """Counts of 2048 bins over the values' range, and the bins' 2049 edges; the same on every device."""
    low, top = torch.aminmax(x)
    width = ((top - low) / _BINS).clamp_min(torch.finfo(x.dtype).tiny)
    places = ((x.flatten() - low) / width).long().clamp_(0, _BINS - 1)
    counts = torch.bincount(places, minlength=_BINS)
    return counts, low + width * torch.arange(_BINS + 1, device=x.device, dtype=x.dtype)
