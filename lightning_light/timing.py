"""When a method acts: the discrete events in which the curve of a schedule is followed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_light.progress import steps_planned, training_progress
from lightning_light.schedules import Schedule, resolve
from lightning_light.validation import PositiveInt, validated

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["Events", "is_due"]

_SAME = 1e-9


def is_due(trainer: Trainer, moment: float) -> bool:
    """Check whether the run has reached ``moment``, a fraction of it; the last step is the end of the run."""
    return Events.due([(moment, 1.0)], training_progress(trainer), steps_planned(trainer)) > 0


@validated
@dataclass(frozen=True)
class Events:
    """The events at which a method acts, by its ``schedule`` and ``every_n_steps``.

    A continuous schedule is followed in evenly spaced events: every ``every_n_steps`` optimizer steps from its start
    on, and once more at its end. A schedule that changes in jumps is followed at the jumps (`Schedule.changes`).

    All results are functions of the progress alone, so that a resumed run acts at the same steps as an uninterrupted
    one, whatever its gradient accumulation.

    Args:
        schedule: which fraction of the way is completed when.
        every_n_steps: optimizer steps between two events; None for ``default_events`` events.
        default_events: number of events of a continuous schedule without ``every_n_steps``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a count is below 1.

    Example:
        >>> from lightning_light.schedules import Linear, Window
        >>> window = Window(Linear(), start=0.0, end=0.5)
        >>> Events(window, default_events=2).points(max_epochs=4, planned_steps=100)
        [(0.25, 0.5), (0.5, 1.0)]
        >>> Events(window, every_n_steps=20).points(max_epochs=4, planned_steps=100)
        [(0.2, 0.4), (0.4, 0.8), (0.5, 1.0)]
    """

    schedule: Schedule
    every_n_steps: PositiveInt | None = None
    default_events: PositiveInt = 10

    def points(self, max_epochs: int | None, planned_steps: int) -> list[tuple[float, float]]:
        """Progress of every event and the fraction of the way that is completed with it, in order.

        Args:
            max_epochs: the Trainer's.
            planned_steps: optimizer steps of the whole run.

        Raises:
            ValueError: the schedule counts epochs, and the run has no ``max_epochs`` or ends before them.
        """
        schedule = resolve(self.schedule, max_epochs)
        changes = schedule.changes()
        points: list[tuple[float, float]] = []
        reached = 0.0
        for progress in self._grid(schedule, planned_steps) if changes is None else sorted(set(changes)):
            after = progress if changes is None else min(progress + _SAME, 1.0)  # on the far side of a jump
            fraction = schedule(after)
            if abs(fraction - reached) > _SAME:
                points.append((progress, fraction))
                reached = fraction
        if changes is not None:
            self._warn_if_merged([progress for progress, _ in points], planned_steps)
        return points

    def window(self, max_epochs: int | None) -> tuple[float, float]:
        """Progress of the first and of the last change, for the order of methods; see `check_order`.

        Raises:
            ValueError: the schedule counts epochs, and the run has no ``max_epochs`` or ends before them.
        """
        return resolve(self.schedule, max_epochs).span()

    @staticmethod
    def due(points: Sequence[tuple[float, float]], progress: float, planned_steps: int) -> int:
        """Count the events that are due at ``progress``, those before included; the last step is the end of the run.

        Example:
            >>> Events.due([(0.25, 0.5), (1.0, 1.0)], progress=0.3, planned_steps=10)
            1
            >>> Events.due([(0.25, 0.5), (1.0, 1.0)], progress=0.9, planned_steps=10)
            2
        """
        last = 1.0 - 1.0 / max(planned_steps, 1)
        return sum(min(point, last) <= progress + _SAME for point, _ in points)

    def _warn_if_merged(self, points: Sequence[float], planned_steps: int) -> None:
        """Warn of jumps that the run has no step between; a run of one step is a rehearsal."""
        steps = {math.ceil(min(point * planned_steps, planned_steps - 1) - _SAME) for point in points}
        if len(steps) < len(points) and planned_steps > 1:
            warnings.warn(
                f"`schedule={self.schedule!r}`: expected an optimizer step between two of its {len(points)} changes, "
                f"found that they fall on {len(steps)} of the {planned_steps} steps of the run: changes at the same "
                "step are made as one. Use fewer steps in the schedule, a wider window, or a longer run.",
                stacklevel=2,
            )

    def _grid(self, schedule: Schedule, planned_steps: int) -> list[float]:
        start, end = schedule.span()
        if self.every_n_steps is None:
            grid = [start + (end - start) * number / self.default_events for number in range(self.default_events + 1)]
        else:
            length = (end - start) * planned_steps / self.every_n_steps
            grid = [start + number * self.every_n_steps / planned_steps for number in range(math.ceil(length - _SAME))]
            grid.append(end)
        return [round(progress, 9) for progress in grid]
