"""What `LowRankFactorization` refuses, early and in one sentence; and when its events are."""

from __future__ import annotations

from lightning_light.budgets import Budget
from lightning_light.events import event_points
from lightning_light.lowrank.ranks import RankRule
from lightning_light.schedules import Schedule, Window, resolve

__all__ = ["check_arguments", "check_moments", "moments"]

_QUANTITIES = ("macs", "params", "bytes", "seconds")


def check_arguments(
    budget: Budget | None, ranks: RankRule | None, *, form: str, importance: str, calibrated: bool, **counts: int
) -> None:
    """Refuse values that can never work, where the user wrote them.

    Raises:
        TypeError: ``budget`` is no budget.
        ValueError: any other value out of range.
    """
    if (budget is None) is (ranks is None):
        found = "neither" if budget is None else "both"
        raise ValueError(
            "`LowRankFactorization()`: expected a budget for the whole network, or a rule for the `ranks` of each "
            f"layer, found {found}. Write for instance `LowRankFactorization(MACs(0.5))` or "
            "`LowRankFactorization(ranks=EnergyKept(0.95))`."
        )
    if budget is not None and not isinstance(budget, Budget):
        raise TypeError(
            f"`LowRankFactorization({budget!r})`: expected a budget, found {type(budget).__name__}. Write for instance "
            "`LowRankFactorization(MACs(0.5))`, to keep half of the multiply-accumulates."
        )
    if budget is not None and budget.quantity not in _QUANTITIES:
        raise ValueError(
            f"`LowRankFactorization({budget!r})`: expected MACs, Params, Size or Latency, found a budget of "
            f"{budget.quantity}, of which factors have more, not fewer."
        )
    _check_choices(form, importance)
    measures = importance == "output" or (ranks is not None and ranks.measures)
    if measures and not calibrated:
        raise ValueError(
            "`LowRankFactorization()`: `importance='output'` and `OutputChange` measure on batches that stay the same: "
            "expected `calibration`, a DataLoader without shuffling or a list of batches, found None."
        )
    for argument, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"`LowRankFactorization({argument}={value!r})`: expected an integer >= 1.")


def _check_choices(form: str, importance: str) -> None:
    if form not in {"auto", "channel", "spatial", "tucker2"}:
        raise ValueError(f"`LowRankFactorization(form={form!r})`: expected 'auto', 'channel', 'spatial' or 'tucker2'.")
    if importance not in {"equal", "output"}:
        raise ValueError(f"`LowRankFactorization(importance={importance!r})`: expected 'equal' or 'output'.")


def check_moments(ranks: RankRule | None, start: int | float, end: int | float | None, schedule: Schedule) -> None:
    """Refuse moments that no run has.

    Raises:
        ValueError: one is out of range, they are out of order, or a rule is to be followed in steps.
    """
    if end is not None and ranks is not None:
        raise ValueError(
            f"`LowRankFactorization(ranks={ranks!r}, end={end})`: expected a budget for ranks that go down in steps, "
            "found a rule, which has one answer. Leave `end` out, or give a budget."
        )
    for argument, moment in {"start": start, "end": end}.items():
        if moment is not None and not _is_moment(moment):
            raise ValueError(
                f"`LowRankFactorization({argument}={moment!r})`: expected a fraction of the run (float in [0, 1]) or "
                "an epoch (int >= 0). Mind the difference between 1 and 1.0."
            )
    if end is not None:
        Window(schedule, start, end)  # says itself what is wrong


def _is_moment(moment: float) -> bool:
    if isinstance(moment, bool):
        return False
    return moment >= 0 if isinstance(moment, int) else 0.0 <= moment <= 1.0


def moments(
    start: int | float, end: int | float | None, schedule: Schedule, events: int, max_epochs: int | None
) -> list[tuple[float, float]]:
    """``(progress, share of the way)`` of every event, in order.

    Raises:
        ValueError: an epoch is given, and the run has no ``max_epochs`` or ends before it.
    """
    if end is None:
        return [(_fraction(start, max_epochs), 1.0)]
    return event_points(resolve(Window(schedule, start, end), max_epochs), events)


def _fraction(moment: float, max_epochs: int | None) -> float:
    if isinstance(moment, float):
        return moment
    if max_epochs is None or max_epochs < 1 or moment >= max_epochs:
        raise ValueError(
            f"`LowRankFactorization(start={moment})` counts epochs: expected one before the end of the run, found "
            f"`Trainer(max_epochs={max_epochs})`. Give a smaller one, or a fraction of the run as a float."
        )
    return moment / max_epochs
