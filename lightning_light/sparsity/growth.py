"""Which connections go and which come: the rules of dynamic sparse training, on one weight at a time.

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

__all__ = ["SET", "Connections", "DynamicMethod", "RigL", "SRigL", "Static"]


@dataclass(frozen=True, eq=False)
class Connections:
    """One weight and its connections, at an update.

    Attributes:
        weight: zero where ``mask`` is False.
        mask: True where there is a connection.
        gradient: dense; None for methods that need none.
        first: how many connections there were at first.
        generator: the same on every process.
    """

    weight: Tensor
    mask: Tensor
    gradient: Tensor | None
    first: int
    generator: torch.Generator

    def largest_gradients(self) -> Tensor:
        """The gradient's magnitude, which methods that say ``needs_gradient`` grow by."""
        assert self.gradient is not None  # as they have said
        return self.gradient.abs()

    def without_smallest(self, count: int) -> Tensor:
        """The mask without its ``count`` smallest weights."""
        return self.mask & ~lowest(torch.where(self.mask, self.weight.abs(), torch.inf), count)


class DynamicMethod(ABC):
    """Moves the connections of a sparse weight; their number stays.

    Attributes:
        needs_gradient: whether connections that are not there need a gradient.
        fraction: share of the connections that moves at the first update.
    """

    needs_gradient: ClassVar[bool] = False
    fraction: float

    def fraction_at(self, progress: float) -> float:
        """Share of the connections that moves when ``progress`` of the updates' window is behind."""
        return self.fraction

    def start(self, scores: Tensor, kept: int) -> Tensor:
        """The first mask: about ``kept`` connections, the highest scores."""
        return ~lowest(scores, scores.numel() - kept)

    @abstractmethod
    def move(self, now: Connections, fraction: float) -> Tensor:
        """The next mask, after ``fraction`` of the connections (from `fraction_at`) has moved."""


def _require_fraction(call: str, **values: float) -> None:
    for name, value in values.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"`{call}`: expected {name} in [0, 1], a share, never percent.")


@dataclass(frozen=True)
class Static(DynamicMethod):
    """Nothing moves: the baseline that a dynamic method has to beat."""

    fraction: float = 0.0

    def __post_init__(self) -> None:
        if self.fraction != 0.0:
            raise ValueError(f"`Static(fraction={self.fraction})`: expected 0, nothing moves. Use `SET()` or `RigL()`.")

    @override
    def move(self, now: Connections, fraction: float) -> Tensor:
        return now.mask


@dataclass(frozen=True)
class SET(DynamicMethod):
    """Drop the positive weights nearest to zero and the negative ones nearest to zero; grow as many at random.

    Mocanu et al., 2018, "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by
    network science". There new weights are drawn at random; here they start at zero. https://arxiv.org/abs/1707.04780

    Args:
        fraction: share of the connections that moves at each update, in [0, 1].

    Raises:
        ValueError: ``fraction`` is out of range.
    """

    fraction: float = 0.3

    def __post_init__(self) -> None:
        _require_fraction(repr(self), fraction=self.fraction)

    @override
    def move(self, now: Connections, fraction: float) -> Tensor:
        survivors = now.mask.clone()
        for side in (now.mask & (now.weight >= 0), now.mask & (now.weight < 0)):
            nearest = torch.where(side, now.weight.abs(), torch.inf)
            survivors &= ~lowest(nearest, int(fraction * int(side.sum())))
        missing = int(now.mask.sum()) - int(survivors.sum())
        draw = torch.rand(now.weight.shape, generator=now.generator).to(now.weight.device)
        return survivors | lowest(torch.where(survivors, torch.inf, draw), missing)


@dataclass(frozen=True)
class RigL(DynamicMethod):
    """Drop the smallest weights, grow where the dense gradient is largest; fewer and fewer.

    The fraction decays as ``fraction / 2 * (1 + cos(pi * t / t_end))``. What was dropped and has a large gradient may
    come back at once, with its value; what is new starts at zero.
    Evci et al., 2020, "Rigging the Lottery: Making All Tickets Winners". https://arxiv.org/abs/1911.11134

    Args:
        fraction: share of the connections that moves at the first update, in [0, 1].

    Raises:
        ValueError: ``fraction`` is out of range.
    """

    needs_gradient: ClassVar[bool] = True
    fraction: float = 0.3

    def __post_init__(self) -> None:
        _require_fraction(repr(self), fraction=self.fraction)

    @override
    def fraction_at(self, progress: float) -> float:
        return self.fraction / 2.0 * (1.0 + math.cos(math.pi * progress))

    @override
    def move(self, now: Connections, fraction: float) -> Tensor:
        count = int(fraction * int(now.mask.sum()))
        survivors = now.without_smallest(count)
        return survivors | lowest(torch.where(survivors, torch.inf, -now.largest_gradients()), count)


@dataclass(frozen=True)
class SRigL(RigL):
    """`RigL` with the same number of inputs for every output; outputs with little to say are ablated.

    At each update the smallest weights go, of the whole layer; an output of whose inputs fewer than ``min_salient`` are
    salient (kept by magnitude, or among the largest gradients) is ablated for good, and the others share its
    connections, each growing where its gradient is largest.
    Lasby et al., 2024, "Dynamic Sparse Training with Structured Sparsity". https://arxiv.org/abs/2305.02299

    Args:
        fraction: share of the connections that moves at the first update, in [0, 1].
        min_salient: share of an output's inputs that must be salient, in [0, 1]; 0 for no ablation.

    Raises:
        ValueError: one of them is out of range.
    """

    min_salient: float = 0.3

    def __post_init__(self) -> None:
        _require_fraction(repr(self), fraction=self.fraction, min_salient=self.min_salient)

    @override
    def start(self, scores: Tensor, kept: int) -> Tensor:
        rows = scores.reshape(len(scores), -1)
        fan_in = max(1, min(round(kept / len(rows)), rows.shape[1]))
        return _highest_of_each(rows, torch.full((len(rows),), fan_in)).reshape(scores.shape)

    @override
    def move(self, now: Connections, fraction: float) -> Tensor:
        count = int(fraction * int(now.mask.sum()))
        kept = now.without_smallest(count)
        survivors, mask, gradient = (t.reshape(len(t), -1) for t in (kept, now.mask, now.largest_gradients()))
        active = mask.any(dim=1)
        candidates = ~mask & active[:, None]
        grown = candidates & lowest(torch.where(candidates, -gradient, torch.inf), min(count, int(candidates.sum())))
        active = self._ablate((survivors | grown).sum(dim=1), active, now.first, mask)
        fan_in = now.first // max(int(active.sum()), 1)
        wanted = torch.where(survivors, torch.inf, gradient)  # survivors first, then the largest gradients
        return _highest_of_each(wanted, torch.where(active, fan_in, 0).cpu()).reshape(now.mask.shape)

    def _ablate(self, salient: Tensor, active: Tensor, connections: int, mask: Tensor) -> Tensor:
        """Which outputs stay: those with enough to say, and in any case as many as can hold the connections."""
        fan_in = int(mask.sum(dim=1).max())
        fewest = math.ceil(connections / mask.shape[1])
        enough = active & (salient >= self.min_salient * fan_in)
        if int(enough.sum()) >= max(fewest, 1):
            return enough
        strength = torch.where(active, salient.float(), -1.0)
        return active & ~lowest(strength, len(active) - max(fewest, 1))


def _highest_of_each(scores: Tensor, counts: Tensor) -> Tensor:
    """In each row the ``counts`` highest; of equal ones the first."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    first = torch.arange(scores.shape[1], device=scores.device)[None] < counts.to(scores.device)[:, None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, first)
