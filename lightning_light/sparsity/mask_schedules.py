"""Schedules that only masks can follow: they fall as well as rise, or set the weights back."""

from __future__ import annotations

import math
from dataclasses import dataclass

from typing_extensions import override

from lightning_light.schedules import Exponential, Schedule, Staircase, Window, resolve

__all__ = ["Alternating", "DenseSparseDense", "Rewinding", "act_window"]

_SAMPLES = 2000


def _require_order(call: str, start: float, end: float) -> None:
    if not 0.0 <= start < end <= 1.0:
        raise ValueError(f"`{call}`: expected 0 <= start < end <= 1, fractions of the run.")


@dataclass(frozen=True)
class Alternating(Schedule):
    """Sparse and dense phases in turn, and sparse to the end: AC/DC.

    Dense until ``start``; then ``phases`` times a sparse and a dense phase of equal length; sparse from ``end`` on.
    Each sparse phase chooses anew; what was zero starts the dense phase at zero.
    Peste et al., 2021, "AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks".
    https://arxiv.org/abs/2106.12379

    Args:
        phases: how many sparse-dense pairs.
        start: fraction of the run.
        end: fraction of the run.

    Raises:
        ValueError: ``phases`` is below 1, or not ``0 <= start < end <= 1``.

    Example:
        >>> schedule = Alternating(phases=2, start=0.2, end=1.0)
        >>> [schedule(progress) for progress in (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)]
        [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    """

    phases: int = 8
    start: float = 0.1
    end: float = 0.85

    def __post_init__(self) -> None:
        _require_order(repr(self), self.start, self.end)
        if self.phases < 1:
            raise ValueError(f"`{self!r}`: expected phases >= 1. For one sparse phase use `OneShot(at=...)`.")

    @override
    def __call__(self, progress: float) -> float:
        if progress < self.start:
            return 0.0
        if progress >= self.end - 1e-9:
            return 1.0
        phase = math.floor((progress - self.start) / (self.end - self.start) * 2 * self.phases + 1e-9)
        return 1.0 if phase % 2 == 0 else 0.0


@dataclass(frozen=True)
class DenseSparseDense(Schedule):
    """Sparse between ``start`` and ``end``, dense before and after: a regularizer, the final network is dense.

    Han et al., 2017, "DSD: Dense-Sparse-Dense Training for Deep Neural Networks", with a sparsity of 0.25 to 0.5.
    https://arxiv.org/abs/1607.04381

    Args:
        start: fraction of the run.
        end: fraction of the run.

    Raises:
        ValueError: unless ``0 <= start < end <= 1``.
    """

    start: float = 1 / 3
    end: float = 2 / 3

    def __post_init__(self) -> None:
        _require_order(repr(self), self.start, self.end)

    @override
    def __call__(self, progress: float) -> float:
        return 1.0 if self.start <= progress < self.end else 0.0


@dataclass(frozen=True)
class Rewinding(Schedule):
    """After each rise of ``schedule`` the weights that are left go back to what they were at ``to``: lottery tickets.

    Iterative magnitude pruning: train, mask, rewind, train again. ``to=0.0`` is the initialization (Frankle & Carbin,
    2019, "The Lottery Ticket Hypothesis", https://arxiv.org/abs/1803.03635); a little later is more stable in larger
    networks (Frankle et al., 2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis",
    https://arxiv.org/abs/1912.05671). The optimizer starts anew with them. The default takes the same share of what is
    left, five times, to a sparsity of 0.9: six rounds of training of equal length, the last for the ticket.

    Args:
        schedule: rises in a few steps, which are the ends of the rounds; the last before the end of the run.
        to: fraction of the run, before the first rise.

    Raises:
        ValueError: ``to`` is not in [0, 1).
    """

    schedule: Schedule = Window(Staircase(Exponential(rate=2.302585), steps=5), end=5 / 6)
    to: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.to, float) or not 0.0 <= self.to < 1.0:
            raise ValueError(f"`Rewinding(to={self.to})`: expected a fraction of the run in [0, 1), for instance 0.02.")

    @override
    def __call__(self, progress: float) -> float:
        return self.schedule(progress)


def act_window(schedule: Schedule, max_epochs: int | None) -> tuple[float, float] | None:
    """From the first change of ``schedule`` to the last, as fractions of the run; None if it never leaves zero."""
    resolved = resolve(schedule, max_epochs)
    points = [number / _SAMPLES for number in range(_SAMPLES + 1)]
    shares = [0.0, *(resolved(point) for point in points)]
    changes = [point for point, before, after in zip(points, shares, shares[1:], strict=False) if before != after]
    return (changes[0], changes[-1]) if changes else None
