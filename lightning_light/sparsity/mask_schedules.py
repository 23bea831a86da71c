"""Schedules for masks alone: they lift masks, or reset the weights that remain."""

from __future__ import annotations

import math
from dataclasses import dataclass

from typing_extensions import override

from lightning_light.schedules import Exponential, Schedule, Staircase, Window
from lightning_light.validation import Fraction, FractionBelowOne, PositiveInt, validated

__all__ = ["Alternating", "DenseSparseDense", "Rewinding"]


def _require_order(call: str, start: float, end: float) -> None:
    if not start < end:
        raise ValueError(f"`{call}`: expected start < end, found {start} and {end}. Write `start=0.2, end=0.8`.")


@validated
@dataclass(frozen=True)
class Alternating(Schedule):
    """Alternate sparse and dense phases, and finish sparse: AC/DC.

    Dense until ``start``; then ``phases`` pairs of a sparse and a dense phase of equal length; sparse from ``end`` on.
    Each sparse phase selects new masks; a weight that was masked starts the dense phase at zero.
    Peste et al., 2021, "AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks".
    https://arxiv.org/abs/2106.12379

    Args:
        phases: number of sparse-dense pairs.
        start: fraction of the run.
        end: fraction of the run.

    Raises:
        ValueError: ``phases`` is below 1, or not ``0 <= start < end <= 1``.

    Example:
        >>> schedule = Alternating(phases=2, start=0.2, end=1.0)
        >>> [schedule(progress) for progress in (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)]
        [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    """

    monotone = False

    phases: PositiveInt = 8
    start: Fraction = 0.1
    end: Fraction = 0.85

    def __post_init__(self) -> None:
        _require_order(repr(self), self.start, self.end)

    @override
    def __call__(self, progress: float) -> float:
        if progress < self.start:
            return 0.0
        if progress >= self.end - 1e-9:
            return 1.0
        phase = math.floor((progress - self.start) / (self.end - self.start) * 2 * self.phases + 1e-9)
        return 1.0 if phase % 2 == 0 else 0.0

    @override
    def changes(self) -> tuple[float, ...]:
        length = (self.end - self.start) / (2 * self.phases)
        return tuple(self.start + number * length for number in range(2 * self.phases + 1))


@validated
@dataclass(frozen=True)
class DenseSparseDense(Schedule):
    """Train sparse between ``start`` and ``end``, dense before and after: a regularizer; the final network is dense.

    Han et al., 2017, "DSD: Dense-Sparse-Dense Training for Deep Neural Networks", with a sparsity of 0.25 to 0.5.
    https://arxiv.org/abs/1607.04381

    Args:
        start: fraction of the run.
        end: fraction of the run.

    Raises:
        ValueError: unless ``0 <= start < end <= 1``.
    """

    monotone = False

    start: Fraction = 1 / 3
    end: Fraction = 2 / 3

    def __post_init__(self) -> None:
        _require_order(repr(self), self.start, self.end)

    @override
    def __call__(self, progress: float) -> float:
        return 1.0 if self.start <= progress < self.end else 0.0

    @override
    def changes(self) -> tuple[float, ...]:
        return (self.start, self.end)


@validated
@dataclass(frozen=True)
class Rewinding(Schedule):
    """Reset the remaining weights to their values at ``rewind_to`` after each rise of ``schedule``: lottery tickets.

    Iterative magnitude pruning: train, mask, rewind, train again. ``rewind_to=0.0`` is the initialization (Frankle &
    Carbin, 2019, "The Lottery Ticket Hypothesis", https://arxiv.org/abs/1803.03635); a slightly later moment is more
    stable in larger networks (Frankle et al., 2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis",
    https://arxiv.org/abs/1912.05671). The optimizer state is reset with the weights. The default removes the same
    fraction of the remaining weights five times, up to a sparsity of 0.9: six rounds of training of equal length.

    Args:
        schedule: rises in a few steps, each the end of a round; the last one before the end of the run.
        rewind_to: fraction of the run, before the first rise.

    Raises:
        ValueError: ``rewind_to`` is not in [0, 1).
    """

    schedule: Schedule = Window(Staircase(Exponential(rate=2.302585), steps=5), end=5 / 6)
    rewind_to: FractionBelowOne = 0.0

    @override
    def __call__(self, progress: float) -> float:
        return self.schedule(progress)

    @override
    def changes(self) -> tuple[float, ...] | None:
        return self.schedule.changes()

    @override
    def span(self) -> tuple[float, float]:
        return self.schedule.span()
