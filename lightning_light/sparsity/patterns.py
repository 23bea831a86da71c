"""Patterns: which weights become zero together. All shapes are ``(out, in, *kernel)``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

__all__ = ["NM", "Block", "Column", "Filter", "Kernel", "Pattern", "Row", "Unstructured"]


class Pattern(ABC):
    """Divides a weight into units of equal size; a unit is kept or zero as a whole."""

    @abstractmethod
    def pool(self, scores: Tensor) -> Tensor:
        """The mean score of each unit."""

    @abstractmethod
    def expand(self, units: Tensor, shape: torch.Size) -> Tensor:
        """What holds for each unit, for each weight of ``shape``: the way back from `pool`."""

    def incompatibility(self, shape: torch.Size) -> str | None:
        """Why a weight of ``shape`` does not divide into units, or None."""
        return None


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Single weights. Most zeros for the least loss; saves size after compression, and time only in sparse kernels.

    Han et al., 2015, "Learning both Weights and Connections for Efficient Neural Networks".
    https://arxiv.org/abs/1506.02626
    """

    @override
    def pool(self, scores: Tensor) -> Tensor:
        return scores

    @override
    def expand(self, units: Tensor, shape: torch.Size) -> Tensor:
        return units


class _Axes(Pattern):
    """Units that run along whole axes."""

    def _axes(self, ndim: int) -> tuple[int, ...]:
        raise NotImplementedError

    @override
    def pool(self, scores: Tensor) -> Tensor:
        axes = self._axes(scores.ndim)
        return scores.mean(dim=axes, keepdim=True) if axes else scores

    @override
    def expand(self, units: Tensor, shape: torch.Size) -> Tensor:
        return units.expand(shape)


@dataclass(frozen=True)
class Filter(_Axes):
    """All weights that make one output. Where nothing else feeds it, the output can be removed: `remove_dead_channels`.

    Li et al., 2017, "Pruning Filters for Efficient ConvNets". https://arxiv.org/abs/1608.08710
    """

    @override
    def _axes(self, ndim: int) -> tuple[int, ...]:
        return tuple(range(1, ndim))


@dataclass(frozen=True)
class Kernel(_Axes):
    """The kernel between one input and one output; in a linear layer a single weight."""

    @override
    def _axes(self, ndim: int) -> tuple[int, ...]:
        return tuple(range(2, ndim))


@dataclass(frozen=True)
class Row(_Axes):
    """One row of one kernel; in a linear layer all weights of one output."""

    @override
    def _axes(self, ndim: int) -> tuple[int, ...]:
        return (ndim - 1,)


@dataclass(frozen=True)
class Column(_Axes):
    """One column of one kernel; in a linear layer all weights of one input."""

    @override
    def _axes(self, ndim: int) -> tuple[int, ...]:
        return (ndim - 2,) if ndim != 3 else (2,)  # the kernel of a 1-d convolution has one axis


@dataclass(frozen=True)
class Block(Pattern):
    """``rows`` neighbouring outputs times ``columns`` neighbouring inputs, at each place of the kernel.

    ``Block(4, 1)`` is what vectorized sparse kernels read: Elsen et al., 2020, "Fast Sparse ConvNets".
    https://arxiv.org/abs/1911.09723

    Args:
        rows: outputs a block.
        columns: inputs a block.

    Raises:
        ValueError: one of them is below 1.
    """

    rows: int = 4
    columns: int = 1

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise ValueError(f"`Block({self.rows}, {self.columns})`: expected two integers >= 1, as in `Block(4, 1)`.")

    @override
    def pool(self, scores: Tensor) -> Tensor:
        out, inputs, *kernel = scores.shape
        blocks = scores.reshape(out // self.rows, self.rows, inputs // self.columns, self.columns, *kernel)
        return blocks.mean(dim=(1, 3))

    @override
    def expand(self, units: Tensor, shape: torch.Size) -> Tensor:
        return units.repeat_interleave(self.rows, dim=0).repeat_interleave(self.columns, dim=1)

    @override
    def incompatibility(self, shape: torch.Size) -> str | None:
        if shape[0] % self.rows or shape[1] % self.columns:
            return f"outputs divisible by {self.rows} and inputs by {self.columns}, found {shape[0]} and {shape[1]}"
        return None


@dataclass(frozen=True)
class NM(Pattern):
    """At most ``n`` of every ``m`` neighbouring weights along the inputs are not zero: ``NM(2, 4)`` is half.

    Mishra et al., 2021, "Accelerating Sparse Deep Neural Networks". https://arxiv.org/abs/2104.08378
    It brings its own budget, and every layer keeps it exactly; on the way there, ``m - 1`` of ``m`` come first.

    Args:
        n: weights kept of each group.
        m: size of a group.

    Raises:
        ValueError: unless ``1 <= n < m``.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise ValueError(
                f"`NM({self.n}, {self.m})`: expected 1 <= n < m, n weights kept of every m. Usual is `NM(2, 4)`."
            )

    @property
    def amount(self) -> float:
        """The share of zeros that the pattern is."""
        return 1.0 - self.n / self.m

    def kept_of(self, share: float) -> int:
        """How many of ``m`` stay when ``share`` of the way is behind: ``m`` at first, ``n`` in the end."""
        return self.m - int(share * (self.m - self.n) + 1e-9)

    def mask(self, scores: Tensor, kept: int) -> Tensor:
        """The ``kept`` highest of each group; of equal ones the first."""
        out, inputs, *kernel = scores.shape
        groups = scores.reshape(out, inputs // self.m, self.m, *kernel)
        order = groups.argsort(dim=2, descending=True, stable=True)
        first = torch.arange(self.m, device=scores.device).reshape(1, 1, -1, *[1] * len(kernel)) < kept
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, order, first.expand_as(order))
        return mask.reshape(scores.shape)

    @override
    def pool(self, scores: Tensor) -> Tensor:
        return scores

    @override
    def expand(self, units: Tensor, shape: torch.Size) -> Tensor:
        return units

    @override
    def incompatibility(self, shape: torch.Size) -> str | None:
        if shape[1] % self.m:
            return f"a number of inputs (per group of the layer) divisible by {self.m}, found {shape[1]}"
        return None
