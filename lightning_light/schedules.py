"""Schedules: progress in [0, 1] -> fraction of the way to the budget, in [0, 1].

The budget is the value to reach, the schedule how fast it is reached. Frozen values without a Trainer; compose them:
``Window(Staircase(Cubic(), steps=4), start=0.1, end=0.6)``.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from typing_extensions import Self, override

from lightning_light.validation import Fraction, Moment, PositiveInt, validated

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
    "require_rising",
    "resolve",
    "resolve_moment",
]

_SAMPLES = 1000


class Schedule(ABC):
    """A function from progress in [0, 1] to the fraction, in [0, 1], of the way to the budget.

    Subclasses are frozen dataclasses; every schedule that they hold in a field is resolved with them.

    Attributes:
        monotone: whether it never falls. Most methods cannot undo a change and accept no other; see `require_rising`.
    """

    monotone = True  # no annotation: jsonargparse would resolve it in the module of each subclass

    @abstractmethod
    def __call__(self, progress: float) -> float:
        """Fraction of the way that is completed at ``progress``."""

    def changes(self) -> tuple[float, ...] | None:
        """Progress of every change of a schedule that is constant in between; None for a continuous one."""
        return None

    def span(self) -> tuple[float, float]:
        """Progress of the first and of the last change."""
        changes = self.changes()
        return (min(changes), max(changes)) if changes else (0.0, 1.0)


@validated
def resolve(schedule: Schedule, max_epochs: int | None) -> Schedule:
    """Turn the epochs of every `Window` in ``schedule`` into fractions of the run.

    Args:
        schedule: any schedule, however nested; it is not changed.
        max_epochs: the Trainer's; None or -1 for a run without a planned number of epochs.

    Raises:
        ValueError: a window counts epochs, and the run has no ``max_epochs`` or ends before them, or the window
            is inside another one, where an epoch has no meaning.

    Example:
        >>> resolve(Window(Cubic(), start=2, end=0.9), max_epochs=10)
        Window(schedule=Cubic(), start=0.2, end=0.9)
    """
    return _with_windows(schedule, lambda window: window.resolved(max_epochs))


@validated
def resolve_moment(moment: Moment, max_epochs: int | None, call: str = "resolve_moment") -> float:
    """Turn a moment (an int is an epoch, a float a fraction of the run) into a fraction of the run.

    Args:
        moment: an epoch, counted from 0, or a fraction.
        max_epochs: the Trainer's; None or -1 for a run without a planned number of epochs.
        call: what the user wrote, for the error message: ``QuantizationAwareTraining(start=3)``.

    Raises:
        ValueError: it is an epoch, and the run has no ``max_epochs`` or ends before it.

    Example:
        >>> resolve_moment(3, max_epochs=12), resolve_moment(0.5, max_epochs=None)
        (0.25, 0.5)
    """
    if isinstance(moment, float):
        return moment
    if max_epochs is None or max_epochs < 1:
        raise ValueError(
            f"`{call}` counts epochs, but this Trainer has max_epochs={max_epochs}. Set `Trainer(max_epochs=...)`, or "
            "give fractions of the run as floats."
        )
    if moment > max_epochs:
        raise ValueError(
            f"`{call}`: expected an epoch of the run, found {moment} with `Trainer(max_epochs={max_epochs})`. An int "
            "is an epoch, a float a fraction: for the end of training write `1.0`."
        )
    return moment / max_epochs


@validated
def require_rising(call: str, schedule: Schedule) -> None:
    """Refuse a schedule that falls, for a method that cannot undo a change.

    A schedule is refused that declares ``monotone = False``, or that falls, or leaves [0, 1], at one of a thousand
    sampled points. Windows in epochs are sampled as well, though the length of the run is not known.

    Args:
        call: the callback or function, for the error message.
        schedule: of any class, a user's included.

    Raises:
        ValueError: the schedule falls or leaves [0, 1].

    Example:
        >>> require_rising("StructuredPruning", Window(Cubic(), start=2, end=5))
    """
    if not schedule.monotone:
        raise ValueError(_falling(call, schedule, f"{type(schedule).__name__}, which also falls"))
    placed = _with_windows(schedule, lambda window: window.placed())
    points = [number / _SAMPLES for number in range(_SAMPLES + 1)]
    values = [placed(point) for point in points]
    for point, value, before in zip(points, values, [0.0, *values], strict=False):
        if not -1e-9 <= value <= 1.0 + 1e-9 or value < before - 1e-9:
            raise ValueError(_falling(call, schedule, f"{value:.3g} at progress {point:.3g} after {before:.3g}"))


def _falling(call: str, schedule: Schedule, found: str) -> str:
    return (
        f"`{call}(schedule={schedule!r})`: expected a schedule that rises from 0 to at most 1, found {found}. "
        f"`{call}` does not undo what it has done: write for instance `schedule=Window(Cubic(), start=0.1, end=0.4)`."
    )


def _with_windows(schedule: Schedule, change: Callable[[Window], Schedule]) -> Schedule:
    """The same schedule with ``change`` applied to every window in it."""
    if isinstance(schedule, Window):
        if type(inner := schedule.schedule) is Window and inner._counts_epochs:
            raise ValueError(
                f"`{schedule!r}`: expected fractions in the inner window, for which the outer window is the whole "
                "run; found epochs. Give fractions, `Window(..., start=0.0, end=0.5)`, or only one window."
            )
        schedule = change(schedule)
    if not (dataclasses.is_dataclass(schedule) and not isinstance(schedule, type)):
        return schedule
    held = {field.name: getattr(schedule, field.name) for field in dataclasses.fields(schedule) if field.init}
    changed = {name: _with_windows(value, change) for name, value in held.items() if isinstance(value, Schedule)}
    return dataclasses.replace(schedule, **changed) if changed else schedule


@validated
@dataclass(frozen=True)
class Constant(Schedule):
    """Keep one value: ``Constant()`` is the whole budget from the first step on.

    Args:
        value: in [0, 1].

    Raises:
        ValueError: unless ``0 <= value <= 1``.
    """

    value: Fraction = 1.0

    @override
    def __call__(self, progress: float) -> float:
        return self.value

    @override
    def changes(self) -> tuple[float, ...]:
        return (0.0,)


@validated
@dataclass(frozen=True)
class OneShot(Schedule):
    """Step from 0 to 1 at one moment.

    Args:
        at: progress in [0, 1] of the step.

    Raises:
        ValueError: unless ``0 <= at <= 1``.

    Example:
        >>> [OneShot(at=0.5)(progress) for progress in (0.0, 0.49, 0.5, 1.0)]
        [0.0, 0.0, 1.0, 1.0]
    """

    at: Fraction = 0.0

    @override
    def __call__(self, progress: float) -> float:
        return 1.0 if progress >= self.at else 0.0

    @override
    def changes(self) -> tuple[float, ...]:
        return (self.at,)


@validated
@dataclass(frozen=True)
class Linear(Schedule):
    """Rise linearly: ``progress``."""

    @override
    def __call__(self, progress: float) -> float:
        return progress


@validated
@dataclass(frozen=True)
class Cubic(Schedule):
    """Rise fast at first, then ever more slowly: ``1 - (1 - progress)**3``.

    Zhu & Gupta, 2017, "To prune, or not to prune: exploring the efficacy of pruning for model compression", eq. 1
    (there ``final + (initial - final) * (1 - progress)**3``). https://arxiv.org/abs/1710.01878

    Example:
        >>> [round(Cubic()(progress), 3) for progress in (0.0, 0.5, 1.0)]
        [0.0, 0.875, 1.0]
    """

    @override
    def __call__(self, progress: float) -> float:
        return 1.0 - (1.0 - progress) ** 3


@validated
@dataclass(frozen=True)
class Cosine(Schedule):
    """Rise slowly at both ends: ``(1 - cos(pi * progress)) / 2``.

    The annealing curve of Loshchilov & Hutter, 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts",
    reversed. https://arxiv.org/abs/1608.03983

    Example:
        >>> [round(Cosine()(progress), 3) for progress in (0.0, 0.25, 0.5, 1.0)]
        [0.0, 0.146, 0.5, 1.0]
    """

    @override
    def __call__(self, progress: float) -> float:
        return (1.0 - math.cos(math.pi * progress)) / 2.0


@validated
@dataclass(frozen=True)
class Exponential(Schedule):
    """Approach the budget at a constant relative rate: ``(1 - exp(-rate * progress)) / (1 - exp(-rate))``.

    Args:
        rate: curvature. Positive: fast first, then slower; negative: slow first. Near 0 it is `Linear`.

    Raises:
        ValueError: ``rate`` is 0 or outside of [-500, 500].

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


@validated
@dataclass(frozen=True)
class Staircase(Schedule):
    """Follow ``schedule`` in ``steps`` jumps, constant between them, so that training can recover.

    The jumps are at progress ``1/steps, 2/steps, ..., 1``: ``schedule(floor(progress * steps) / steps)``.

    Args:
        schedule: the curve that is followed.
        steps: number of jumps.

    Raises:
        ValueError: ``steps`` is below 1.

    Example:
        >>> [Staircase(Linear(), steps=4)(progress) for progress in (0.0, 0.24, 0.25, 0.9, 1.0)]
        [0.0, 0.0, 0.25, 0.75, 1.0]
    """

    schedule: Schedule
    steps: PositiveInt

    @override
    def __call__(self, progress: float) -> float:
        return self.schedule(math.floor(progress * self.steps + 1e-9) / self.steps)  # 0.29 * 100 < 29

    @override
    def changes(self) -> tuple[float, ...]:
        return tuple(step / self.steps for step in range(self.steps + 1))


@validated
@dataclass(frozen=True)
class Window(Schedule):
    """Run ``schedule`` between ``start`` and ``end``: 0 before, its last value after.

    Args:
        schedule: the curve inside, for which the window is the whole run.
        start: an int is an epoch (counted from 0), a float a fraction of the run, as in Lightning's
            ``swa_epoch_start``; ``1`` and ``1.0`` differ.
        end: as ``start``.

    Raises:
        ValueError: unless ``start < end``, fractions in [0, 1] and epochs not negative.

    Example:
        >>> schedule = Window(Linear(), start=0.2, end=0.6)
        >>> [round(schedule(progress), 3) for progress in (0.1, 0.2, 0.4, 0.6, 0.9)]
        [0.0, 0.0, 0.5, 1.0, 1.0]
    """

    schedule: Schedule
    start: Moment = 0.0
    end: Moment = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.start, float) is isinstance(self.end, float) and not self.start < self.end:
            raise ValueError(
                f"`Window(start={self.start}, end={self.end})`: expected start < end. For the first half of training "
                "write `Window(..., start=0.0, end=0.5)`, for its first five epochs `Window(..., start=0, end=5)`."
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
        call = f"Window(start={self.start}, end={self.end})"
        start, end = (resolve_moment(moment, max_epochs, call) for moment in (self.start, self.end))
        if not start < end:
            raise ValueError(
                f"`{call}`: expected start < end, found {start:.3g} to {end:.3g} of a run of {max_epochs} epochs. An "
                "int is an epoch, a float a fraction: for the end of training write `end=1.0`."
            )
        return dataclasses.replace(self, start=start, end=end)

    def placed(self) -> Self:
        """The same window, over the whole run where it counts epochs: the same values in the same order."""
        return dataclasses.replace(self, start=0.0, end=1.0) if self._counts_epochs else self

    @override
    def __call__(self, progress: float) -> float:
        if self._counts_epochs:
            raise ValueError(
                f"`Window(start={self.start}, end={self.end})`: expected fractions of the run when it is called, found "
                "epochs. Resolve it first: `resolve(schedule, max_epochs)`."
            )
        if progress < self.start:
            return 0.0
        return self.schedule(min((progress - self.start) / (self.end - self.start), 1.0))

    @override
    def changes(self) -> tuple[float, ...] | None:
        inner = self.schedule.changes()
        return None if inner is None else tuple(self._outside(point) for point in inner)

    @override
    def span(self) -> tuple[float, float]:
        first, last = self.schedule.span()
        return self._outside(first), self._outside(last)

    def _outside(self, point: float) -> float:
        """Progress of the run at progress ``point`` of the window."""
        return self.start + (self.end - self.start) * point
