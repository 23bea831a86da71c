"""Rules of dynamic sparse training: which connections of one weight are dropped, and which are grown.

All tensors are ``(out, in, *kernel)``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_light.sparsity.scope import lowest
from lightning_light.validation import Fraction, validated

__all__ = ["SET", "Connections", "DynamicMethod", "RigL", "SRigL", "Static"]


@dataclass(frozen=True, eq=False)
class Connections:
    """One weight and its connections at an update.

    Attributes:
        weight: zero where ``mask`` is False.
        mask: True where there is a connection.
        gradient: dense; None for methods that need none.
        initial_count: number of connections after the first mask.
        generator: the same on every process.
    """

    weight: Tensor
    mask: Tensor
    gradient: Tensor | None
    initial_count: int
    generator: torch.Generator

    def largest_gradients(self) -> Tensor:
        """The magnitude of the gradient, by which methods with ``needs_gradient`` grow."""
        assert self.gradient is not None  # since ``needs_gradient`` is set
        return self.gradient.abs()

    def without_smallest(self, count: int) -> Tensor:
        """The mask without its ``count`` smallest weights."""
        return self.mask & ~lowest(torch.where(self.mask, self.weight.abs(), torch.inf), count)


class DynamicMethod(ABC):
    """Drop and grow the connections of a sparse weight; their number is constant.

    Attributes:
        needs_gradient: whether masked weights need a gradient.
        decays: whether the fraction of connections that is replaced follows the schedule down to zero.
        fraction: of the connections that is replaced at the first update.
    """

    needs_gradient: ClassVar[bool] = False
    decays: ClassVar[bool] = False
    fraction: float

    def fraction_at(self, completed: float) -> float:
        """Return the fraction of connections that is replaced when ``completed`` of the schedule has passed."""
        return self.fraction * (1.0 - completed) if self.decays else self.fraction

    def initial_mask(self, scores: Tensor, kept: int) -> Tensor:
        """Select about ``kept`` connections with the highest scores."""
        return ~lowest(scores, scores.numel() - kept)

    @abstractmethod
    def update(self, now: Connections, fraction: float) -> Tensor:
        """Return the next mask, with ``fraction`` of the connections (from `fraction_at`) replaced."""


@validated
@dataclass(frozen=True)
class Static(DynamicMethod):
    """Keep the first connections: the baseline of the dynamic methods."""

    fraction: ClassVar[float] = 0.0  # type: ignore[misc]  # a field of the other methods

    @override
    def update(self, now: Connections, fraction: float) -> Tensor:
        return now.mask


@validated
@dataclass(frozen=True)
class SET(DynamicMethod):
    """Drop the smallest positive and the largest negative weights; grow as many connections at random.

    Mocanu et al., 2018, "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by
    network science". There new weights are initialized at random; here they start at zero. https://arxiv.org/abs/1707.04780

    Args:
        fraction: fraction of the connections that is replaced at each update, in [0, 1].

    Raises:
        ValueError: ``fraction`` is out of range.
    """

    fraction: Fraction = 0.3

    @override
    def update(self, now: Connections, fraction: float) -> Tensor:
        survivors = now.mask.clone()
        for side in (now.mask & (now.weight >= 0), now.mask & (now.weight < 0)):
            nearest = torch.where(side, now.weight.abs(), torch.inf)
            survivors &= ~lowest(nearest, int(fraction * int(side.sum())))
        missing = int(now.mask.sum()) - int(survivors.sum())
        draw = torch.rand(now.weight.shape, generator=now.generator).to(now.weight.device)
        return survivors | lowest(torch.where(survivors, torch.inf, draw), missing)


@validated
@dataclass(frozen=True)
class RigL(DynamicMethod):
    """Drop the smallest weights and grow where the dense gradient is largest, with a decaying fraction.

    With the default schedule the fraction decays as ``fraction / 2 * (1 + cos(pi * t / t_end))``. A dropped connection
    with a large gradient may be grown again in the same update and then keeps its value; others start at zero.
    Evci et al., 2020, "Rigging the Lottery: Making All Tickets Winners". https://arxiv.org/abs/1911.11134

    Args:
        fraction: fraction of the connections that is replaced at the first update, in [0, 1].

    Raises:
        ValueError: ``fraction`` is out of range.
    """

    needs_gradient: ClassVar[bool] = True
    decays: ClassVar[bool] = True
    fraction: Fraction = 0.3

    @override
    def update(self, now: Connections, fraction: float) -> Tensor:
        count = int(fraction * int(now.mask.sum()))
        survivors = now.without_smallest(count)
        return survivors | lowest(torch.where(survivors, torch.inf, -now.largest_gradients()), count)


@validated
@dataclass(frozen=True)
class SRigL(RigL):
    """`RigL` with a constant fan-in: the same number of inputs for every output; weak outputs are ablated.

    At each update the smallest weights of the whole layer are dropped. An output with fewer than ``min_salient`` of its
    inputs salient (kept by magnitude, or among the largest gradients) is ablated permanently, and its connections are
    divided among the others, which grow where their gradient is largest.
    Lasby et al., 2024, "Dynamic Sparse Training with Structured Sparsity". https://arxiv.org/abs/2305.02299

    Args:
        fraction: fraction of the connections that is replaced at the first update, in [0, 1].
        min_salient: fraction of an output's inputs that must be salient, in [0, 1]; 0 for no ablation.

    Raises:
        ValueError: one of them is out of range.
    """

    min_salient: Fraction = 0.3

    @override
    def initial_mask(self, scores: Tensor, kept: int) -> Tensor:
        rows = scores.reshape(len(scores), -1)
        fan_in = max(1, min(round(kept / len(rows)), rows.shape[1]))
        return _highest_of_each(rows, torch.full((len(rows),), fan_in)).reshape(scores.shape)

    @override
    def update(self, now: Connections, fraction: float) -> Tensor:
        count = int(fraction * int(now.mask.sum()))
        kept = now.without_smallest(count)
        survivors, mask, gradient = (t.reshape(len(t), -1) for t in (kept, now.mask, now.largest_gradients()))
        active = mask.any(dim=1)
        candidates = ~mask & active[:, None]
        grown = candidates & lowest(torch.where(candidates, -gradient, torch.inf), min(count, int(candidates.sum())))
        active = self._ablate((survivors | grown).sum(dim=1), active, now.initial_count, mask)
        fan_in = now.initial_count // max(int(active.sum()), 1)
        wanted = torch.where(survivors, torch.inf, gradient)  # survivors first, then the largest gradients
        return _highest_of_each(wanted, torch.where(active, fan_in, 0).cpu()).reshape(now.mask.shape)

    def _ablate(self, salient: Tensor, active: Tensor, connections: int, mask: Tensor) -> Tensor:
        """Select the outputs that stay: those with enough salient inputs, at least as many as the connections need."""
        fan_in = int(mask.sum(dim=1).max())
        fewest = math.ceil(connections / mask.shape[1])
        enough = active & (salient >= self.min_salient * fan_in)
        if int(enough.sum()) >= max(fewest, 1):
            return enough
        strength = torch.where(active, salient.float(), -1.0)
        return active & ~lowest(strength, len(active) - max(fewest, 1))


def _highest_of_each(scores: Tensor, counts: Tensor) -> Tensor:
    """Mark the ``counts`` highest scores of each row; of equal scores the first."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    first = torch.arange(scores.shape[1], device=scores.device)[None] < counts.to(scores.device)[:, None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, first)
