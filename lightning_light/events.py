"""When a method acts: a schedule's curve, taken in a few steps."""

from __future__ import annotations

from lightning_light.schedules import Schedule, Window

__all__ = ["event_points", "points_done"]

_SAME = 1e-9


def event_points(schedule: Schedule, events: int) -> list[tuple[float, float]]:
    """``(progress, share)`` of every event, in order: where the schedule has risen since the one before.

    Args:
        schedule: resolved, that is in fractions of the run.
        events: how many steps a continuous schedule is taken in.

    Example:
        >>> from lightning_light.schedules import Linear, OneShot, Window
        >>> event_points(Window(Linear(), start=0.0, end=0.5), events=2)
        [(0.25, 0.5), (0.5, 1.0)]
        >>> event_points(OneShot(), events=10)
        [(0.0, 1.0)]
    """
    start, end = (schedule.start, schedule.end) if isinstance(schedule, Window) else (0.0, 1.0)
    points: list[tuple[float, float]] = []
    reached = 0.0
    for number in range(events + 1):
        progress = round(start + (end - start) * number / events, 9)
        share = schedule(progress)
        if share > reached + _SAME:
            points.append((progress, share))
            reached = share
    return points


def points_done(points: list[tuple[float, float]], progress: float, planned: int) -> int:
    """How many of ``points`` lie behind or are due now; the last step of a run is its end."""
    last = 1.0 - 1.0 / max(planned, 1)
    return sum(min(point, last) <= progress + _SAME for point, _ in points)
