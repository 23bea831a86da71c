"""What `LowRankFactorization` refuses, early and in one sentence; and when its events are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_light.budgets import Budget
from lightning_light.events import event_points
from lightning_light.schedules import Window, resolve

if TYPE_CHECKING:
    from lightning_light.lowrank.low_rank_factorization import LowRankFactorization

__all__ = ["check_arguments", "moments"]

_QUANTITIES = ("macs", "params", "bytes", "seconds")


def check_arguments(given: LowRankFactorization) -> None:
    """Refuse values that can never work, where the user wrote them.

    Raises:
        TypeError: ``budget`` is no budget.
        ValueError: any other value out of range.
    """
    name = type(given).__name__
    if (given.budget is None) is (given.ranks is None):
        found = "neither" if given.budget is None else "both"
        raise ValueError(
            f"`{name}()`: expected a budget for the whole network, or a rule for the `ranks` of each layer, found "
            f"{found}. Write for instance `{name}(MACs(0.5))` or `{name}(ranks=EnergyKept(0.95))`."
        )
    if given.budget is not None and not isinstance(given.budget, Budget):
        raise TypeError(
            f"`{name}({given.budget!r})`: expected a budget, found {type(given.budget).__name__}. Write for instance "
            f"`{name}(MACs(0.5))`, to keep half of the multiply-accumulates."
        )
    if given.budget is not None and given.budget.quantity not in _QUANTITIES:
        raise ValueError(
            f"`{name}({given.budget!r})`: expected MACs, Params, Size or Latency, found a budget of "
            f"{given.budget.quantity}, of which factors have more, not fewer."
        )
    _check_choices(given, name)
    for argument, least in {"round_to": 1, "min_rank": 1, "events": 1, "calibration_batches": 1}.items():
        value = getattr(given, argument)
        if not isinstance(value, int) or value < least:
            raise ValueError(f"`{name}({argument}={value!r})`: expected an integer >= {least}.")


def _check_choices(given: LowRankFactorization, name: str) -> None:
    if given.form not in {"auto", "channel", "spatial", "tucker2"}:
        raise ValueError(f"`{name}(form={given.form!r})`: expected 'auto', 'channel', 'spatial' or 'tucker2'.")
    if given.importance not in {"equal", "output"}:
        raise ValueError(f"`{name}(importance={given.importance!r})`: expected 'equal' or 'output'.")
    measures = given.importance == "output" or (given.ranks is not None and given.ranks.measures)
    if measures and given.calibration is None:
        raise ValueError(
            f"`{name}()`: `importance='output'` and `OutputChange` measure on batches that stay the same: expected "
            "`calibration`, a DataLoader without shuffling or a list of batches, found None."
        )
    if given.end is not None and given.budget is None:
        raise ValueError(
            f"`{name}(ranks={given.ranks!r}, end={given.end})`: expected a budget for ranks that go down in steps, "
            "found a rule, which has one answer. Leave `end` out, or give a budget."
        )
    _check_moments(given, name)


def _check_moments(given: LowRankFactorization, name: str) -> None:
    for argument, moment in {"start": given.start, "end": given.end}.items():
        if moment is not None and not _is_moment(moment):
            raise ValueError(
                f"`{name}({argument}={moment!r})`: expected a fraction of the run (float in [0, 1]) or an epoch "
                "(int >= 0). Mind the difference between 1 and 1.0."
            )
    if given.end is not None:
        Window(given.schedule, given.start, given.end)  # says itself what is wrong


def _is_moment(moment: float) -> bool:
    if isinstance(moment, bool):
        return False
    return moment >= 0 if isinstance(moment, int) else 0.0 <= moment <= 1.0


def moments(given: LowRankFactorization, max_epochs: int | None) -> list[tuple[float, float]]:
    """``(progress, share of the way)`` of every event, in order.

    Raises:
        ValueError: an epoch is given, and the run has no ``max_epochs`` or ends before it.
    """
    if given.end is None:
        return [(_fraction(given.start, max_epochs), 1.0)]
    return event_points(resolve(Window(given.schedule, given.start, given.end), max_epochs), given.events)


def _fraction(moment: float, max_epochs: int | None) -> float:
    if isinstance(moment, float):
        return moment
    if max_epochs is None or max_epochs < 1 or moment >= max_epochs:
        raise ValueError(
            f"`LowRankFactorization(start={moment})` counts epochs: expected one before the end of the run, found "
            f"`Trainer(max_epochs={max_epochs})`. Give a smaller one, or a fraction of the run as a float."
        )
    return moment / max_epochs
