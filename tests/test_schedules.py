import math
from dataclasses import dataclass

import pytest
from hypothesis import given, strategies as st

from lightning_light.schedules import (
    Constant,
    Cosine,
    Cubic,
    Exponential,
    Linear,
    OneShot,
    Schedule,
    Staircase,
    Window,
    require_rising,
    resolve,
    resolve_moment,
)

CURVES: list[Schedule] = [
    Linear(),
    Cubic(),
    Cosine(),
    Exponential(3.0),
    Exponential(-3.0),
    Exponential(500.0),
    Staircase(Cubic(), steps=4),
]
SHAPES = [*CURVES, Constant(0.3), OneShot(0.4), Window(Cubic(), 0.2, 0.7), Window(Window(Linear(), 0.5, 1.0), 0.2, 0.7)]
PROGRESS = st.floats(0.0, 1.0)


@pytest.mark.parametrize("curve", CURVES, ids=repr)
def test_a_curve_leads_from_nothing_to_everything(curve: Schedule) -> None:
    assert curve(0.0) == 0.0
    assert curve(1.0) == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize("schedule", SHAPES, ids=repr)
@given(one=PROGRESS, other=PROGRESS)
def test_a_schedule_never_goes_back_and_stays_in_bounds(schedule: Schedule, one: float, other: float) -> None:
    early, late = schedule(min(one, other)), schedule(max(one, other))
    assert 0.0 <= early <= late + 1e-15
    assert late <= 1.0


@given(PROGRESS, st.floats(0.05, 0.99))
def test_cubic_is_equation_1_of_zhu_and_gupta(progress: float, final: float) -> None:
    initial = 0.02
    share = Cubic()(progress)
    assert initial + share * (final - initial) == pytest.approx(final + (initial - final) * (1 - progress) ** 3)


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_formulas(progress: float) -> None:
    assert Cosine()(progress) == pytest.approx(0.5 - 0.5 * math.cos(math.pi * progress))
    assert Exponential(2.0)(progress) == pytest.approx((1 - math.exp(-2 * progress)) / (1 - math.exp(-2)))
    assert Exponential(1e-9)(progress) == pytest.approx(progress)


@pytest.mark.parametrize("steps", [1, 3, 7, 100])
def test_a_staircase_has_its_steps_where_rounding_could_lose_them(steps: int) -> None:
    staircase = Staircase(Linear(), steps)
    assert [staircase(step / steps) for step in range(steps + 1)] == [step / steps for step in range(steps + 1)]
    assert len({staircase(point / 2100) for point in range(2101)}) == steps + 1


@pytest.mark.parametrize("schedule", SHAPES, ids=repr)
def test_a_window_is_flat_outside(schedule: Schedule) -> None:
    window = Window(schedule, start=0.25, end=0.75)
    assert window(0.0) == window(0.2499) == 0.0
    assert window(0.75) == window(1.0) == schedule(1.0)
    assert window(0.5) == schedule(0.5)


def test_epochs_become_fractions() -> None:
    assert Window(Cubic(), start=3, end=6).resolved(12) == Window(Cubic(), 0.25, 0.5)
    assert Window(Cubic(), start=0.1, end=6).resolved(12) == Window(Cubic(), 0.1, 0.5)
    assert Window(Cubic(), start=0, end=12).resolved(12) == Window(Cubic(), 0.0, 1.0)
    assert Window(Cubic(), 0.1, 0.2).resolved(None) == Window(Cubic(), 0.1, 0.2)


def test_an_epoch_begins_at_the_very_step_that_training_begins_it() -> None:
    for epochs in (3, 7, 30):
        for start in range(epochs - 1):
            window = Window(Constant(), start=start, end=epochs).resolved(epochs)
            shares = [window(step / (epochs * 13)) for step in range(epochs * 13)]
            assert shares.index(1.0) == start * 13


def test_resolve_reaches_what_is_nested() -> None:
    nested = Staircase(Window(Staircase(Cubic(), 2), start=1, end=3), steps=4)
    assert resolve(nested, 4) == Staircase(Window(Staircase(Cubic(), 2), start=0.25, end=0.75), steps=4)
    assert resolve(Cubic(), None) is not None


def test_resolve_keeps_a_schedule_of_the_user() -> None:
    class Square(Schedule):
        def __call__(self, progress: float) -> float:
            return progress**2

    square = Square()
    assert resolve(square, 3) is square
    assert Window(square, 0.5, 1.0)(0.75) == 0.25


@pytest.mark.parametrize("max_epochs", [None, -1])
def test_epochs_need_a_run_that_counts_them(max_epochs: int | None) -> None:
    with pytest.raises(ValueError, match=r"counts epochs, but this Trainer has max_epochs=.*Set `Trainer"):
        resolve(Window(Cubic(), start=1, end=2), max_epochs)


def test_an_epoch_after_the_end_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"`Window\(start=2, end=9\)`: expected an epoch of the run, found 9.*max_epochs=4"
    ):
        Window(Cubic(), start=2, end=9).resolved(4)
    with pytest.raises(ValueError, match=r"found 0\.5 to 0\.4 of a run of 10 epochs"):
        Window(Cubic(), start=5, end=0.4).resolved(10)


def test_epochs_within_a_window_are_refused() -> None:
    with pytest.raises(ValueError, match="expected fractions in the inner window"):
        resolve(Window(Window(Cubic(), start=1, end=2), 0.5, 1.0), 4)


def test_an_unresolved_window_does_not_answer() -> None:
    with pytest.raises(ValueError, match="Resolve it first"):
        Window(Cubic(), start=1, end=2)(0.5)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Constant(1.5), ValueError, r"`Constant\(value=1.5\)`: expected 0 <= value <= 1"),
        (lambda: OneShot(-0.1), ValueError, r"`OneShot\(at=-0.1\)`: expected 0 <= at <= 1"),
        (lambda: OneShot(math.nan), ValueError, "expected 0 <= at <= 1"),
        (lambda: Exponential(0.0), ValueError, r"`Exponential\(rate=0.0\)`: expected a rate other than 0"),
        (lambda: Exponential(math.inf), ValueError, "expected a rate"),
        (lambda: Staircase(Linear(), 0), ValueError, r"expected an integer >= 1"),
        (lambda: Window(Linear(), 0.6, 0.2), ValueError, r"`Window\(start=0.6, end=0.2\)`: expected start < end"),
        (lambda: Window(Linear(), 0.5, 0.5), ValueError, "expected start < end"),
        (lambda: Window(Linear(), 0.5, 5.0), ValueError, r"`Window\(end=5.0\)`: expected an epoch .* or a fraction"),
        (lambda: Window(Linear(), -1, 5), ValueError, r"`Window\(start=-1\)`: expected an epoch"),
        (lambda: Window(Linear(), True, 5), TypeError, "found bool True"),
        (lambda: Window(0.5, 0.0, 1.0), TypeError, r"expected a Schedule, found float 0.5"),  # type: ignore[arg-type]
        (lambda: Staircase(Linear, 3), TypeError, r"expected a Schedule, found the class Linear.*Linear\(\)"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_work_is_refused_at_once(build, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize("schedule", SHAPES, ids=repr)
def test_a_schedule_is_a_value(schedule: Schedule) -> None:
    assert eval(repr(schedule)) == schedule
    assert hash(schedule) == hash(eval(repr(schedule)))


def test_a_moment_is_an_epoch_or_a_fraction() -> None:
    assert resolve_moment(3, 12) == 0.25
    assert resolve_moment(12, 12) == 1.0
    assert resolve_moment(0.3, None) == 0.3
    with pytest.raises(ValueError, match=r"`QAT\(start=3\)` counts epochs, but this Trainer has max_epochs=None"):
        resolve_moment(3, None, "QAT(start=3)")
    with pytest.raises(ValueError, match=r"expected an epoch of the run, found 13.*max_epochs=12"):
        resolve_moment(13, 12)


@dataclass(frozen=True)
class Falling(Schedule):
    schedule: Schedule = Linear()

    def __call__(self, progress: float) -> float:
        return 1.0 - self.schedule(progress)


@dataclass(frozen=True)
class Overshooting(Schedule):
    def __call__(self, progress: float) -> float:
        return 1.5 * progress


class Declared(Linear):
    monotone = False


@pytest.mark.parametrize("schedule", [*SHAPES, Window(Cubic(), 2, 5), Staircase(Window(Cubic(), 1, 0.9), 3)], ids=repr)
def test_rising_schedules_are_accepted(schedule: Schedule) -> None:
    require_rising("Method", schedule)


@pytest.mark.parametrize(
    ("schedule", "found"),
    [
        (Falling(), "at progress 0.001 after 1"),
        (Window(Falling(), 0.2, 0.4), "after 1"),
        (Window(Falling(), 2, 4), "after 1"),
        (Falling(Window(Linear(), 2, 4)), "after 1"),
        (Overshooting(), "found 1 at progress 0.667|found 1.0"),
        (Declared(), "found Declared, which also falls"),
    ],
)
def test_falling_schedules_are_refused(schedule: Schedule, found: str) -> None:
    with pytest.raises(ValueError, match=rf"`Method\(schedule=.*\)`: expected a schedule that rises.*({found})"):
        require_rising("Method", schedule)


@pytest.mark.parametrize("schedule", SHAPES, ids=repr)
def test_changes_and_span_are_where_the_values_change(schedule: Schedule) -> None:
    points = [number / 2000 for number in range(2001)]
    values = [schedule(point) for point in points]
    moved = [point for point, value, before in zip(points, values, [0.0, *values], strict=False) if value != before]
    first, last = schedule.span()
    assert first <= moved[0] + 1e-9
    assert moved[-1] <= last + 1e-3
    if (changes := schedule.changes()) is not None:
        assert all(min(abs(point - change) for change in changes) <= 5e-4 + 1e-9 for point in moved)
