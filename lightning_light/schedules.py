"""Schedules: training progress in [0, 1] -> share of the way to the budget, in [0, 1].

*Where to* is the budget's, *how fast* the schedule's. Pure, frozen, free of any Trainer; compose them:
``Window(Staircase(Cubic(), steps=4), start=0.1, end=0.6)``.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from typing_extensions import Self, override

__all__ = [
    "Constant",
    "Cosine",
    "Cubic",
    "Exponential",
    "Linear",
    "OneShot",
    "Schedule",
    "Staircase",
    "Window",
    "resolve",
]


class Schedule(ABC):
    """A monotone function from progress in [0, 1] to a share in [0, 1] of the way to the budget.

    Subclasses are frozen dataclasses; every schedule they hold in a field is resolved with them.
    """

    @abstractmethod
    def __call__(self, progress: float) -> float:
        """Share of the way that lies behind at ``progress``."""


def resolve(schedule: Schedule, max_epochs: int | None) -> Schedule:
    """The same schedule with every epoch, of every `Window` in it, turned into a fraction of the run.

    Args:
        schedule: any schedule, however nested; it stays as it is.
        max_epochs: the Trainer's; None or -1 for a run without a planned number of epochs.

    Raises:
        ValueError: a window counts epochs, and the run has no ``max_epochs`` or ends before them, or the window
            lies within another, where an epoch has no place.

    Example:
        >>> resolve(Window(Cubic(), start=2, end=0.9), max_epochs=10)
        Window(schedule=Cubic(), start=0.2, end=0.9)
    """
    if isinstance(schedule, Window):
        if type(inner := schedule.schedule) is Window and inner._counts_epochs:
            raise ValueError(
                f"`{schedule!r}`: expected fractions in the inner window, which sees the outer window as its whole "
                f"run; found epochs. Give fractions, `Window(..., start=0.0, end=0.5)`, or only one window."
            )
        schedule = schedule.resolved(max_epochs)
    if not (dataclasses.is_dataclass(schedule) and not isinstance(schedule, type)):
        return schedule
    held = {field.name: getattr(schedule, field.name) for field in dataclasses.fields(schedule) if field.init}
    changes = {name: resolve(value, max_epochs) for name, value in held.items() if isinstance(value, Schedule)}
    return dataclasses.replace(schedule, **changes) if changes else schedule


@dataclass(frozen=True)
class Constant(Schedule):
    """The same share all along: ``Constant()`` asks for the whole budget from the first step.

    Args:
        share: in [0, 1].

    Raises:
        ValueError: unless ``0 <= share <= 1``.
    """

    share: float = 1.0

    def __post_init__(self) -> None:
        _require_fraction("Constant", "share", self.share)

    @override
    def __call__(self, progress: float) -> float:
        return self.share


@dataclass(frozen=True)
class OneShot(Schedule):
    """Nothing until ``at``, everything from there on.

    Args:
        at: progress in [0, 1] of the one step.

    Raises:
        ValueError: unless ``0 <= at <= 1``.

    Example:
        >>> [OneShot(at=0.5)(progress) for progress in (0.0, 0.49, 0.5, 1.0)]
        [0.0, 0.0, 1.0, 1.0]
    """

    at: float = 0.0

    def __post_init__(self) -> None:
        _require_fraction("OneShot", "at", self.at)

    @override
    def __call__(self, progress: float) -> float:
        return 1.0 if progress >= self.at else 0.0


@dataclass(frozen=True)
class Linear(Schedule):
    """A straight line: ``progress``."""

    @override
    def __call__(self, progress: float) -> float:
        return progress


@dataclass(frozen=True)
class Cubic(Schedule):
    """Rises fast while there is much to spare, then settles: ``1 - (1 - progress)**3``.

    Zhu & Gupta, 2017, "To prune, or not to prune: exploring the efficacy of pruning for model compression", eq. 1
    (there ``final + (initial - final) * (1 - progress)**3``). https://arxiv.org/abs/1710.01878

    Example:
        >>> [round(Cubic()(progress), 3) for progress in (0.0, 0.5, 1.0)]
        [0.0, 0.875, 1.0]
    """

    @override
    def __call__(self, progress: float) -> float:
        return 1.0 - (1.0 - progress) ** 3


@dataclass(frozen=True)
class Cosine(Schedule):
    """Gentle at both ends: ``(1 - cos(pi * progress)) / 2``.

    The annealing curve of Loshchilov & Hutter, 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts",
    turned over. https://arxiv.org/abs/1608.03983

    Example:
        >>> [round(Cosine()(progress), 3) for progress in (0.0, 0.25, 0.5, 1.0)]
        [0.0, 0.146, 0.5, 1.0]
    """

    @override
    def __call__(self, progress: float) -> float:
        return (1.0 - math.cos(math.pi * progress)) / 2.0


@dataclass(frozen=True)
class Exponential(Schedule):
    """Approaches the budget at a steady relative pace: ``(1 - exp(-rate * progress)) / (1 - exp(-rate))``.

    Args:
        rate: how bent the curve is. Positive: fast first, then slower; negative: slow first. Near 0 it is `Linear`.

    Raises:
        ValueError: ``rate`` is 0 or beyond 500 on either side.

    Example:
        >>> [round(Exponential(rate=3.0)(progress), 3) for progress in (0.0, 0.5, 1.0)]
        [0.0, 0.818, 1.0]
    """

    rate: float = 3.0

    def __post_init__(self) -> None:
        if not 0.0 < abs(self.rate) <= 500.0:
            raise ValueError(
                f"`Exponential(rate={self.rate})`: expected a rate other than 0, within [-500, 500]. "
                "For a straight line use `Linear()`, for one step `OneShot()`."
            )

    @override
    def __call__(self, progress: float) -> float:
        return math.expm1(-self.rate * progress) / math.expm1(-self.rate)


@dataclass(frozen=True)
class Staircase(Schedule):
    """Follows ``schedule`` in ``steps`` jumps, level between them, so that training can recover.

    The jumps are at ``1/steps, 2/steps, ..., 1`` of the way: ``schedule(floor(progress * steps) / steps)``.

    Args:
        schedule: the curve that the steps stand on.
        steps: number of jumps.

    Raises:
        ValueError: ``steps`` is below 1.

    Example:
        >>> [Staircase(Linear(), steps=4)(progress) for progress in (0.0, 0.24, 0.25, 0.9, 1.0)]
        [0.0, 0.0, 0.25, 0.75, 1.0]
    """

    schedule: Schedule
    steps: int

    def __post_init__(self) -> None:
        _require_schedule("Staircase", self.schedule)
        if self.steps < 1:
            raise ValueError(
                f"`Staircase(..., steps={self.steps})`: expected an integer >= 1. For a single jump use `OneShot()`."
            )

    @override
    def __call__(self, progress: float) -> float:
        return self.schedule(math.floor(progress * self.steps + 1e-9) / self.steps)  # 0.29 * 100 < 29


@dataclass(frozen=True)
class Window(Schedule):
    """Runs ``schedule`` between ``start`` and ``end``: 0 before, its last value after.

    Args:
        schedule: what happens inside; sees the window as its whole run.
        start: an int is an epoch (counted from 0), a float a fraction of the run, as in Lightning's
            ``swa_epoch_start``. Mind the difference between ``1`` and ``1.0``.
        end: likewise.

    Raises:
        ValueError: unless ``start < end``, fractions in [0, 1] and epochs not negative.

    Example:
        >>> schedule = Window(Linear(), start=0.2, end=0.6)
        >>> [round(schedule(progress), 3) for progress in (0.1, 0.2, 0.4, 0.6, 0.9)]
        [0.0, 0.0, 0.5, 1.0, 1.0]
    """

    schedule: Schedule
    start: int | float = 0.0
    end: int | float = 1.0

    def __post_init__(self) -> None:
        _require_schedule("Window", self.schedule)
        same_unit = isinstance(self.start, float) is isinstance(self.end, float)
        fits = all(_is_moment(moment) for moment in (self.start, self.end))
        if not fits or (same_unit and not self.start < self.end):
            raise ValueError(
                f"`Window(start={self.start}, end={self.end})`: expected start < end, each a fraction of the run "
                "(float in [0, 1]) or an epoch (int >= 0). For the first half of training write "
                "`Window(..., start=0.0, end=0.5)`, for its first five epochs `Window(..., start=0, end=5)`."
            )

    @property
    def _counts_epochs(self) -> bool:
        return isinstance(self.start, int) or isinstance(self.end, int)

    def resolved(self, max_epochs: int | None) -> Self:
        """The same window in fractions of a run of ``max_epochs`` epochs.

        Args:
            max_epochs: the Trainer's; None or -1 for a run without a planned number of epochs.

        Raises:
            ValueError: the window counts epochs, and the run has no ``max_epochs`` or ends before them.

        Example:
            >>> Window(Linear(), start=3, end=1.0).resolved(max_epochs=12)
            Window(schedule=Linear(), start=0.25, end=1.0)
        """
        if not self._counts_epochs:
            return self
        if max_epochs is None or max_epochs < 1:
            raise ValueError(
                f"`Window(start={self.start}, end={self.end})` counts epochs, but this Trainer has "
                f"max_epochs={max_epochs}. Set `Trainer(max_epochs=...)`, or give fractions of the run as floats."
            )
        start, end = (moment / max_epochs if isinstance(moment, int) else moment for moment in (self.start, self.end))
        if not start < end <= 1.0:
            raise ValueError(
                f"`Window(start={self.start}, end={self.end})`: expected start < end <= max_epochs={max_epochs}, "
                f"found {start:.3g} to {end:.3g} of the run. An int is an epoch, a float a fraction: for the end of "
                "training write `end=1.0`."
            )
        return dataclasses.replace(self, start=start, end=end)

    @override
    def __call__(self, progress: float) -> float:
        if self._counts_epochs:
            raise ValueError(
                f"`Window(start={self.start}, end={self.end})` counts epochs and was asked before it knew the run. "
                "Resolve it first: `resolve(schedule, max_epochs)`."
            )
        if progress < self.start:
            return 0.0
        return self.schedule(min((progress - self.start) / (self.end - self.start), 1.0))


def _is_moment(moment: float) -> bool:
    if isinstance(moment, bool):
        return False
    return moment >= 0 if isinstance(moment, int) else 0.0 <= moment <= 1.0


def _require_fraction(kind: str, name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(
            f"`{kind}({name}={value})`: expected a fraction in [0, 1], never percent. "
            f"For a half write `{kind}({name}=0.5)`."
        )


def _require_schedule(kind: str, schedule: object) -> None:
    if not isinstance(schedule, Schedule):
        raise TypeError(
            f"`{kind}({schedule!r}, ...)`: expected a schedule, found {type(schedule).__name__}. "
            f"Write for instance `{kind}(Cubic(), ...)`."
        )
