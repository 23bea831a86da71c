"""Which method may act before which other: one pure function over the Trainer's callbacks."""

from collections.abc import Sequence
from enum import IntEnum
from itertools import combinations

from lightning_light.errors import OrderError

__all__ = ["Stage", "check_order"]

Window = tuple[float, float]
Item = tuple[str, int, Window | None]


class Stage(IntEnum):
    """When in a chain of methods a method belongs: each works on what the ones before it have left."""

    DISTILLATION = 0
    STRUCTURED = 1
    MASKS = 2
    FACTORS = 3
    QUANTIZATION = 4
    EXPORT = 5
    MONITORS = 6


# A teacher helps throughout, and monitors only watch: neither has to wait for the others.
_ORDERED = range(Stage.STRUCTURED, Stage.EXPORT + 1)


def check_order(items: Sequence[Item]) -> None:
    """Channels leave first, then weights become zero, then layers are factored, then bits; the export is last.

    A pair of methods with windows is judged by them: the later stage may begin when the earlier one has ended, or at
    that very point if it also stands later in the list. A pair in which one has no window is judged by the list.

    Args:
        items: for each method in the order of the Trainer's list: name, stage, and the window in which it changes the
            network, as fractions of the run, or None.

    Raises:
        OrderError: a pair is in the wrong order, or their windows overlap. The message has the right order.

    Example:
        >>> check_order([("Pruning", Stage.STRUCTURED, (0.1, 0.6)), ("Quantization", Stage.QUANTIZATION, (0.7, 1.0))])
        >>> check_order([("Quantization", Stage.QUANTIZATION, None), ("Pruning", Stage.STRUCTURED, None)])
        Traceback (most recent call last):
            ...
        lightning_light.errors.OrderError: `callbacks=[Quantization, Pruning]`: expected ...
    """
    ordered = [item for item in items if item[1] in _ORDERED]
    for first, second in combinations(ordered, 2):
        if first[1] != second[1] and (incompatibility := _complaint(first, second)):
            names = ", ".join(name for name, _, _ in items)
            right = ", ".join(name for name, _, _ in sorted(ordered, key=lambda item: item[1]))
            raise OrderError(
                f"`callbacks=[{names}]`: expected {right} in this order, each beginning when the one before has ended; "
                f"found {incompatibility}. Reorder the list, or move the windows apart."
            )


def _complaint(first: Item, second: Item) -> str | None:
    """What is wrong with two methods of different stages that stand in the list in this order."""
    early, late = sorted((first, second), key=lambda item: item[1])
    (early_name, _, early_window), (late_name, _, late_window) = early, late
    inverted = early is second
    if early_window is None or late_window is None:
        return f"{late_name} before {early_name} in the list" if inverted else None
    end, start = early_window[1], late_window[0]
    if start < end:
        return f"{late_name} beginning at {start:.0%} of the run, while {early_name} goes on until {end:.0%}"
    if start == end and inverted:
        return f"{late_name} before {early_name} in the list, and both acting at {start:.0%} of the run"
    return None
