"""Observers: the numbers of a training batch -> the range that the grid of their tensor has to hold."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_light.errors import LightningLightError

__all__ = ["MSE", "AtRunTime", "MinMax", "MovingAverage", "Observer", "Percentile", "StepSize", "observer_of"]

_BINS = 2048
_CANDIDATES = 64


def _kind_of(kind: type[Observer]) -> str:
    ours = kind.__module__ == __name__
    return kind.__name__ if ours else f"{kind.__module__}.{kind.__qualname__}"


class Observer(ABC):
    """How the range of a tensor is found; a frozen dataclass.

    A subclass looks at one batch. Its `share` says how batches, and processes, come together: as a moving average in
    which a new batch has that share, or, where it is None, as the widest range of all.
    """

    share: float | None
    _kinds: ClassVar[dict[str, type[Observer]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        """A checkpoint names the class, and finds it again if it has been imported."""
        super().__init_subclass__(**options)
        Observer._kinds[_kind_of(cls)] = cls

    @abstractmethod
    def extremes(self, x: Tensor, high: int, positive: bool) -> Tensor:
        """``(2,)``: from where to where the grid should go for ``x``, a tensor with at least one number.

        Args:
            x: without a gradient; float32 or finer.
            high: steps of the grid.
            positive: the grid begins at zero.
        """

    def plain(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"kind": _kind_of(type(self)), **asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class MovingAverage(Observer):
    """The smallest and the largest value of each batch, averaged over batches.

    Jacob et al., 2018, section 3.1. https://arxiv.org/abs/1712.05877

    Args:
        share: weight of a new batch, in (0, 1].

    Raises:
        ValueError: ``share`` out of range.
    """

    share: float = 0.01

    def __post_init__(self) -> None:
        _check_share(self)

    @override
    def extremes(self, x: Tensor, high: int, positive: bool) -> Tensor:
        return torch.stack(torch.aminmax(x))


@dataclass(frozen=True)
class MinMax(Observer):
    """The smallest and the largest value that any batch had: nothing is ever cut off."""

    @property
    def share(self) -> None:  # type: ignore[override]
        """The widest range."""
        return

    @override
    def extremes(self, x: Tensor, high: int, positive: bool) -> Tensor:
        return torch.stack(torch.aminmax(x))


@dataclass(frozen=True)
class Percentile(Observer):
    """The range that holds a fraction of a batch's values at each end, from a histogram of 2048 bins.

    McKinstry et al., 2018, "Discovering Low-Precision Networks Close to Full-Precision Networks for Efficient
    Embedded Inference". https://arxiv.org/abs/1809.04191

    Args:
        fraction: of the values that are below the upper end, and above the lower; in (0.5, 1).
        share: weight of a new batch in the moving average, in (0, 1].

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> Percentile(0.9).extremes(torch.linspace(0.0, 10.0, 1001), 255, True).round(decimals=1)
        tensor([1., 9.])
    """

    fraction: float = 0.999
    share: float = 0.01

    def __post_init__(self) -> None:
        _check_share(self)
        if not 0.5 < self.fraction < 1.0:
            raise ValueError(
                f"`Percentile(fraction={self.fraction})`: expected 0.5 < fraction < 1, the values that are kept at "
                "each end. Usual is 0.999; for all of them write `MinMax()`."
            )

    @override
    def extremes(self, x: Tensor, high: int, positive: bool) -> Tensor:
        counts, edges = _histogram(x)
        below = counts.double().cumsum(0) / x.numel()
        ends = torch.tensor([1.0 - self.fraction, self.fraction], device=x.device, dtype=below.dtype)
        places = torch.searchsorted(below, ends)
        return torch.stack([edges[places[0]], edges[places[1] + 1]])


@dataclass(frozen=True)
class MSE(Observer):
    """The range for which a batch's values and their rounded ones differ least, in mean squared error.

    Searched among 64 ranges that shrink from the batch's own, on a histogram of 2048 bins.

    Choukroun et al., 2019, "Low-bit Quantization of Neural Networks for Efficient Inference", equation 5.
    https://arxiv.org/abs/1902.06822

    Args:
        share: weight of a new batch in the moving average, in (0, 1].

    Raises:
        ValueError: ``share`` out of range.
    """

    share: float = 0.01

    def __post_init__(self) -> None:
        _check_share(self)

    @override
    def extremes(self, x: Tensor, high: int, positive: bool) -> Tensor:
        counts, edges = _histogram(x)
        center = ((edges[1:] + edges[:-1]) / 2).double()
        shrink = torch.linspace(1.0 / _CANDIDATES, 1.0, _CANDIDATES, device=x.device, dtype=torch.float64)[:, None]
        low = (edges[0].double() * (0.0 if positive else 1.0)).clamp_max(0.0) * shrink
        top = edges[-1].double().clamp_min(0.0) * shrink
        scale = ((top - low) / high).clamp_min(1e-12)
        zero = (-low / scale).round()
        rounded = ((center / scale).round() + zero).clamp(0, high).sub(zero).mul(scale)
        best = (counts.double() * (rounded - center).square()).sum(1).argmin()
        return torch.cat([low[best], top[best]]).to(edges.dtype)


@dataclass(frozen=True)
class AtRunTime(Observer):
    """No range is kept: every forward pass takes the smallest and largest value of the tensor that it has.

    What runtimes call dynamic quantization.
    """

    @property
    def share(self) -> None:  # type: ignore[override]
        """Nothing is averaged."""
        return

    @override
    def extremes(self, x: Tensor, high: int, positive: bool) -> Tensor:
        return torch.stack(torch.aminmax(x))


@dataclass(frozen=True)
class StepSize(Observer):
    """The range of the step size that `LSQ` begins with: ``2 * mean|x| / sqrt(high)``.

    Esser et al., 2020, section 2.1. https://arxiv.org/abs/1902.08153
    """

    share: float = 0.1

    @override
    def extremes(self, x: Tensor, high: int, positive: bool) -> Tensor:
        above = high if positive else (high - 1) // 2
        step = 2.0 * x.abs().mean() / above**0.5
        return torch.stack([step * 0.0 if positive else -step * (above + 1), step * above])


def observer_of(plain: dict[str, Any]) -> Observer:
    """What `Observer.plain` wrote.

    Raises:
        LightningLightError: nothing of that name has been imported.

    Example:
        >>> observer_of(Percentile(0.99).plain())
        Percentile(fraction=0.99, share=0.01)
    """
    kind: Any = Observer._kinds.get(plain["kind"])
    if kind is None:
        raise LightningLightError(
            f"A checkpoint with the observer `{plain['kind']}`: expected its class to be defined, found "
            f"{sorted(Observer._kinds)}. Import it before you load."
        )
    return kind(**{field.name: plain[field.name] for field in fields(kind)})  # type: ignore[no-any-return]


def _histogram(x: Tensor) -> tuple[Tensor, Tensor]:
    """Counts of 2048 bins over the values' range, and the bins' 2049 edges; the same on every device."""
    low, top = torch.aminmax(x)
    width = ((top - low) / _BINS).clamp_min(torch.finfo(x.dtype).tiny)
    places = ((x.flatten() - low) / width).long().clamp_(0, _BINS - 1)
    counts = torch.bincount(places, minlength=_BINS)
    return counts, low + width * torch.arange(_BINS + 1, device=x.device, dtype=x.dtype)


def _check_share(observer: Any) -> None:
    if not 0.0 < observer.share <= 1.0:
        raise ValueError(
            f"`{type(observer).__name__}(share={observer.share})`: expected 0 < share <= 1, the weight of a new batch "
            "in the moving average. Usual is 0.01."
        )
