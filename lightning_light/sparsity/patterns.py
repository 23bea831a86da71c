"""Sparsity patterns: which weights are masked together. All shapes are ``(out, in, *kernel)``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from lightning_light.validation import PositiveInt, validated

__all__ = ["NM", "Block", "Column", "Filter", "Kernel", "Pattern", "Row", "Unstructured"]


class Pattern(ABC):
    """Divide a weight into units of equal size; a unit is kept or masked as a whole."""

    @abstractmethod
    def pool(self, scores: Tensor) -> Tensor:
        """Average the scores over each unit."""

    @abstractmethod
    def expand(self, units: Tensor, shape: torch.Size) -> Tensor:
        """Repeat a value per unit for every weight of ``shape``: the inverse of `pool`."""

    def incompatibility(self, shape: torch.Size) -> str | None:
        """Explain why a weight of ``shape`` does not divide into units; None if it does."""
        return None


class _Single(Pattern):
    """Mask single weights."""

    @override
    def pool(self, scores: Tensor) -> Tensor:
        return scores

    @override
    def expand(self, units: Tensor, shape: torch.Size) -> Tensor:
        return units


@dataclass(frozen=True)
class Unstructured(_Single):
    """Mask single weights: the highest sparsity for the least loss of accuracy.

    It reduces the compressed size; it reduces time only in kernels for sparse weights.

    Han et al., 2015, "Learning both Weights and Connections for Efficient Neural Networks".
    https://arxiv.org/abs/1506.02626
    """


class _Axes(Pattern):
    """Mask units that span whole axes."""

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
    """Mask whole filters: all weights of one output. `remove_dead_channels` then removes the outputs.

    Li et al., 2017, "Pruning Filters for Efficient ConvNets". https://arxiv.org/abs/1608.08710
    """

    @override
    def _axes(self, ndim: int) -> tuple[int, ...]:
        return tuple(range(1, ndim))


@dataclass(frozen=True)
class Kernel(_Axes):
    """Mask the kernel between one input and one output; in a linear layer a single weight."""

    @override
    def _axes(self, ndim: int) -> tuple[int, ...]:
        return tuple(range(2, ndim))


@dataclass(frozen=True)
class Row(_Axes):
    """Mask one row of one kernel; in a linear layer all weights of one output."""

    @override
    def _axes(self, ndim: int) -> tuple[int, ...]:
        return (ndim - 1,)


@dataclass(frozen=True)
class Column(_Axes):
    """Mask one column of one kernel; in a linear layer all weights of one input."""

    @override
    def _axes(self, ndim: int) -> tuple[int, ...]:
        return (ndim - 2,) if ndim != 3 else (2,)  # the kernel of a 1-d convolution has one axis


@validated
@dataclass(frozen=True)
class Block(Pattern):
    """Mask blocks: ``rows`` neighbouring outputs by ``columns`` neighbouring inputs, per position of the kernel.

    Vectorized sparse kernels use ``Block(4, 1)``: Elsen et al., 2020, "Fast Sparse ConvNets".
    https://arxiv.org/abs/1911.09723

    Args:
        rows: outputs per block.
        columns: inputs per block.

    Raises:
        ValueError: one of them is below 1.
    """

    rows: PositiveInt = 4
    columns: PositiveInt = 1

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


@validated
@dataclass(frozen=True)
class NM(_Single):
    """Keep at most ``n`` of every ``m`` neighbouring weights along the inputs: ``NM(2, 4)`` is a sparsity of one half.

    Mishra et al., 2021, "Accelerating Sparse Deep Neural Networks". https://arxiv.org/abs/2104.08378
    The pattern determines the sparsity of every layer exactly. Gradual schedules pass through ``m - 1`` of ``m``.

    Args:
        n: weights kept per group.
        m: size of a group.

    Raises:
        ValueError: unless ``1 <= n < m``.
    """

    n: PositiveInt = 2
    m: PositiveInt = 4

    def __post_init__(self) -> None:
        if not self.n < self.m:
            raise ValueError(
                f"`NM({self.n}, {self.m})`: expected 1 <= n < m, n weights kept of every m. Usual is `NM(2, 4)`."
            )

    @property
    def sparsity(self) -> float:
        """The sparsity of every layer under this pattern."""
        return 1.0 - self.n / self.m

    def kept_at(self, fraction: float) -> int:
        """Weights kept of every ``m`` at ``fraction`` of the way to the budget: ``m`` at 0, ``n`` at 1."""
        return self.m - int(fraction * (self.m - self.n) + 1e-9)

    def mask(self, scores: Tensor, kept: int) -> Tensor:
        """Keep the ``kept`` highest scores of each group; of equal scores the first."""
        out, inputs, *kernel = scores.shape
        groups = scores.reshape(out, inputs // self.m, self.m, *kernel)
        order = groups.argsort(dim=2, descending=True, stable=True)
        first = torch.arange(self.m, device=scores.device).reshape(1, 1, -1, *[1] * len(kernel)) < kept
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, order, first.expand_as(order))
        return mask.reshape(scores.shape)

    @override
    def incompatibility(self, shape: torch.Size) -> str | None:
        if shape[1] % self.m:
            return f"a number of inputs (per group of the layer) divisible by {self.m}, found {shape[1]}"
        return None
