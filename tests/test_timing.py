"""When a method acts: events from a schedule, in steps that do not depend on how the run is cut up."""

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from lightning_light.schedules import Constant, Cubic, Linear, OneShot, Schedule, Staircase, Window
from lightning_light.timing import Events

SCHEDULES: list[Schedule] = [
    Cubic(),
    Window(Cubic(), 0.1, 0.4),
    Window(Linear(), 2, 5),
    Window(Staircase(Cubic(), 4), 0.2, 0.9),
    OneShot(0.37),
    Window(Constant(0.5), 0.3),
]


@dataclass(frozen=True)
class Doubling(Schedule):
    """Of a user: rises in ways that the package knows nothing of."""

    def __call__(self, progress: float) -> float:
        return max(0.0, 2.0 * progress - 1.0)


@pytest.mark.parametrize("every_n_steps", [None, 1, 7, 1000])
@pytest.mark.parametrize("schedule", [*SCHEDULES, Doubling()], ids=repr)
def test_events_rise_in_order_and_end_where_the_schedule_ends(schedule: Schedule, every_n_steps: int | None) -> None:
    events = Events(schedule, every_n_steps)
    points = events.points(max_epochs=10, planned_steps=200)
    progress, fractions = zip(*points, strict=True)
    assert list(progress) == sorted(set(progress))
    assert list(fractions) == sorted(set(fractions))
    start, end = events.window(10)
    assert start - 1e-9 <= progress[0] <= progress[-1] <= end + 1e-9
    assert fractions[-1] == {OneShot: 1.0}.get(type(schedule), getattr(schedule, "schedule", schedule)(1.0))


def test_every_n_steps_is_the_distance_of_two_events() -> None:
    points = Events(Window(Linear(), 0.25, 0.75), every_n_steps=20).points(None, planned_steps=200)
    assert [round(progress * 200) for progress, _ in points] == [70, 90, 110, 130, 150]
    assert [fraction for _, fraction in points] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_the_end_of_the_window_is_an_event_where_the_steps_do_not_meet_it() -> None:
    points = Events(Window(Linear(), 0.0, 0.5), every_n_steps=40).points(None, planned_steps=200)
    assert [round(progress * 200) for progress, _ in points] == [40, 80, 100]
    assert points[-1] == (0.5, 1.0)


@pytest.mark.parametrize("count", [1, 4, 10])
def test_without_every_n_steps_the_default_number_of_events_is_spread_evenly(count: int) -> None:
    points = Events(Window(Linear(), 2, 6), default_events=count).points(max_epochs=8, planned_steps=999)
    assert [progress for progress, _ in points] == pytest.approx([0.25 + 0.5 * k / count for k in range(1, count + 1)])


def test_jumps_are_events_wherever_they_are() -> None:
    assert Events(OneShot(0.37), every_n_steps=50).points(None, 100) == [(0.37, 1.0)]
    assert Events(OneShot()).points(None, 100) == [(0.0, 1.0)]
    assert Events(Window(Staircase(Linear(), 2), 0.2, 0.6)).points(None, 100) == [(0.4, 0.5), (0.6, 1.0)]
    assert Events(Constant(0.0)).points(None, 100) == []


def test_rounds_without_a_step_between_them_are_not_merged_in_silence() -> None:
    events = Events(Window(Staircase(Linear(), 6), end=0.5))
    with pytest.warns(UserWarning, match=r"two of its 6 changes, found that they fall on 4 of the 8 steps of the run"):
        merged = events.points(None, 8)
    assert [due for _, due in acts(events, range(9), 12, done=0)] == [1, 2, 3, 4, 5, 6]
    assert len(merged) == 6
    assert len(events.points(None, 1)) == 6  # a rehearsal


@given(at=st.floats(0.0, 1.0), start=st.floats(0.0, 0.9), length=st.floats(0.05, 0.1), steps=st.integers(1, 9))
def test_no_jump_is_lost_to_rounding(at: float, start: float, length: float, steps: int) -> None:
    window = (start, start + length)
    assert [fraction for _, fraction in Events(Window(OneShot(at), *window)).points(None, 1000)] == [1.0]
    fractions = [fraction for _, fraction in Events(Window(Staircase(Linear(), steps), *window)).points(None, 1000)]
    assert fractions == [step / steps for step in range(1, steps + 1)]


@given(
    planned=st.integers(1, 400),
    start=st.floats(0.0, 0.6),
    length=st.floats(0.05, 0.4),
    every_n_steps=st.one_of(st.none(), st.integers(1, 50)),
    stopped=st.floats(0.0, 1.0),
)
def test_a_resumed_run_acts_at_the_same_steps(planned, start, length, every_n_steps, stopped) -> None:
    """Each step asks how many events are due; a run that stops and continues asks the same at each step."""
    events = Events(Window(Cubic(), start, start + length), every_n_steps)
    whole = acts(events, range(planned), planned, done=0)
    cut = int(stopped * planned)
    first = acts(events, range(cut), planned, done=0)
    second = acts(events, range(cut, planned), planned, done=max([due for _, due in first], default=0))
    assert first + second == whole
    assert whole[-1][1] == len(events.points(None, planned)), "everything is done at the start of the last step"


def acts(events: Events, steps, planned: int, done: int) -> list[tuple[int, int]]:
    points, found = events.points(None, planned), []
    for step in steps:
        if (due := events.due(points, step / planned, planned)) > done:
            found.append((step, due))
            done = due
    return found


def test_the_distance_in_steps_holds_for_any_start() -> None:
    events = Events(Window(Linear(), 0.13, 0.9), every_n_steps=10)
    steps = [step for step, _ in acts(events, range(333), 333, done=0)]
    assert {later - earlier for earlier, later in pairwise(steps[:-1])} == {10}
    assert steps[0] == math.ceil(0.13 * 333 + 10)


@pytest.mark.parametrize(
    ("build", "error"),
    [
        (lambda: Events("cubic"), TypeError),
        (lambda: Events(Cubic), TypeError),
        (lambda: Events(Cubic(), every_n_steps=0), ValueError),
        (lambda: Events(Cubic(), every_n_steps=2.5), TypeError),
        (lambda: Events(Cubic(), default_events=0), ValueError),
    ],
)
def test_what_cannot_work_is_refused_at_once(build, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"`Events\(.*\)`: expected"):
        build()


def test_epochs_need_a_run_that_counts_them() -> None:
    with pytest.raises(ValueError, match="counts epochs"):
        Events(Window(Cubic(), 1, 2)).points(None, 100)
