"""Order of the methods in a run: their stages, their default windows, and the check of a Trainer's callbacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from itertools import combinations
from types import MappingProxyType
from typing import TypeAlias

from lightning_light.errors import OrderError

__all__ = ["DEFAULT_WINDOWS", "Stage", "check_order"]

Window: TypeAlias = tuple[float, float]
Item: TypeAlias = tuple[str, int, "Window | None"]


class Stage(IntEnum):
    """Position of a method in a chain of methods: each works on what the stages before it have left.

    The numbers leave room: a method of your own may stand between two of them, ``stage = Stage.MASKS + 5``.
    """

    DISTILLATION = 0
    REPARAMETERIZATION = 5
    DEPTH = 8
    SUBSTITUTION = 9
    STRUCTURED = 10
    MASKS = 20
    FACTORS = 30
    CLUSTERING = 35
    QUANTIZATION = 40
    EXPORT = 50
    MONITORS = 60


DEFAULT_WINDOWS: Mapping[Stage, Window] = MappingProxyType(
    {
        Stage.DEPTH: (0.02, 0.1),
        Stage.SUBSTITUTION: (0.1, 0.1),
        Stage.STRUCTURED: (0.1, 0.4),
        Stage.MASKS: (0.4, 0.6),
        Stage.FACTORS: (0.6, 0.7),
        Stage.CLUSTERING: (0.7, 0.7),
        Stage.QUANTIZATION: (0.7, 1.0),
    }
)
"""Windows of the default schedules, one after the other, as fractions of the run."""


def check_order(items: Sequence[Item]) -> None:
    """Refuse methods in an order that cannot work.

    Blocks are removed first, convolutions are replaced by lighter operators, then channels are removed; then weights
    are masked, then layers are factorized, clustered, quantized; the export comes last. Two methods with windows are
    compared by them: the later stage may begin when the earlier one has ended or, if it also comes later in the list,
    at that very point. Two methods of which one has no window are compared by their places in the list. A stage below
    ``Stage.DEPTH`` or above ``Stage.EXPORT`` (distillation, monitors) is in no order; re-parameterization, which
    expands before pruning and merges after it, checks its own.

    Args:
        items: for each method in the order of the Trainer's list: name, stage (one of `Stage`, or any number between),
            and the window in which it changes the network, as fractions of the run, or None.

    Raises:
        OrderError: a pair is in the wrong order, or their windows overlap. The message has the right order.

    Example:
        >>> check_order([("Pruning", Stage.STRUCTURED, (0.1, 0.6)), ("Quantization", Stage.QUANTIZATION, (0.7, 1.0))])
        >>> check_order([("Quantization", Stage.QUANTIZATION, None), ("Pruning", Stage.STRUCTURED, None)])
        Traceback (most recent call last):
            ...
        lightning_light.errors.OrderError: `callbacks=[Quantization, Pruning]`: expected ...
    """
    ordered = [item for item in items if Stage.DEPTH <= item[1] <= Stage.EXPORT]
    for first, second in combinations(ordered, 2):
        if first[1] != second[1] and (conflict := _conflict(first, second)):
            names = ", ".join(name for name, _, _ in items)
            right = ", ".join(name for name, _, _ in sorted(ordered, key=lambda item: item[1]))
            raise OrderError(
                f"`callbacks=[{names}]`: expected {right} in this order, each beginning when the one before has ended; "
                f"found {conflict}. Reorder the list, or move the windows apart."
            )


def _conflict(first: Item, second: Item) -> str | None:
    """What is wrong with two methods of different stages that stand in the list in this order."""
    early, late = sorted((first, second), key=lambda item: item[1])
    (early_name, _, early_window), (late_name, _, late_window) = early, late
    inverted = early is second
    if early_window is None or late_window is None:
        return f"{late_name} before {early_name} in the list" if inverted else None
    end, start = early_window[1], late_window[0]
    if start < end:
        return f"{late_name} beginning at {start:.0%} of the run, while {early_name} continues until {end:.0%}"
    if start == end and inverted:
        return f"{late_name} before {early_name} in the list, and both acting at {start:.0%} of the run"
    return None
