"""Check and resolve when stages begin: an int is an epoch, a float a fraction of the run."""

from __future__ import annotations

from lightning_light.quantization.recipes import Recipe
from lightning_light.schedules import Constant, Schedule, Window

__all__ = ["check_moments", "resolve_moment"]


def check_moments(recipe: object, calibration_batches: int, schedule: object = None, **moments: int | float) -> None:
    """Refuse values that can never work, where the user wrote them.

    Raises:
        TypeError: ``recipe`` is no recipe, or ``bit_width_schedule`` no schedule.
        ValueError: any other value out of range, or out of order.
    """
    if not isinstance(recipe, Recipe):
        raise TypeError(
            f"`QuantizationAwareTraining({recipe!r})`: expected a recipe, found {type(recipe).__name__}. Write "
            "`QuantizationAwareTraining(Int8())`."
        )
    if schedule is not None and not isinstance(schedule, Schedule):
        raise TypeError(
            f"`QuantizationAwareTraining(bit_width_schedule={schedule!r})`: expected a schedule or None, found "
            f"{type(schedule).__name__}. Write `bit_width_schedule=Window(Staircase(Linear(), steps=2), end=0.6)`."
        )
    if not isinstance(calibration_batches, int) or calibration_batches < 1:
        raise ValueError(
            f"`QuantizationAwareTraining(calibration_batches={calibration_batches!r})`: expected an integer >= 1."
        )
    for name, moment in moments.items():
        number = isinstance(moment, int | float) and not isinstance(moment, bool)
        fits = number and (moment >= 0 if isinstance(moment, int) else 0.0 <= moment <= 1.0)
        if not fits or (name == "start" and moment == 1.0 and isinstance(moment, float)):
            raise ValueError(
                f"`QuantizationAwareTraining({name}={moment!r})`: expected a fraction of the run (float in [0, 1]) or "
                "an epoch (int >= 0). For the last third of the run write `start=0.67`."
            )
    fractions = {name: moment for name, moment in moments.items() if isinstance(moment, float)}
    if list(fractions.values()) != sorted(fractions.values()):
        raise ValueError(
            f"`QuantizationAwareTraining({', '.join(f'{name}={moment}' for name, moment in moments.items())})`: "
            "expected start <= freeze_observers <= freeze_batch_norm."
        )


def resolve_moment(name: str, moment: int | float, max_epochs: int | None) -> float:
    """Convert ``moment`` to a fraction of a run of ``max_epochs`` epochs.

    Raises:
        ValueError: it is an epoch, and the run has no ``max_epochs``, or starts after the last.

    Example:
        >>> resolve_moment("start", 3, max_epochs=12), resolve_moment("start", 0.5, max_epochs=None)
        (0.25, 0.5)
    """
    if isinstance(moment, float) or name != "start":
        return float(moment) if isinstance(moment, float) else _fraction(name, moment, max_epochs)
    if max_epochs is None or max_epochs < 1:
        return _fraction(name, moment, max_epochs)
    return float(Window(Constant(), start=moment, end=1.0).resolved(max_epochs).start)


def _fraction(name: str, epoch: int, max_epochs: int | None) -> float:
    if max_epochs is None or max_epochs < 1:
        raise ValueError(
            f"`QuantizationAwareTraining({name}={epoch})` counts epochs, but this Trainer has max_epochs={max_epochs}. "
            "Set `Trainer(max_epochs=...)`, or give a fraction of the run as a float."
        )
    return min(epoch / max_epochs, 1.0)
