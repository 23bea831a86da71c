"""Budgets: what a run is to reach. Solved for, never guessed.

A budget names one ``quantity`` and its ``goal``; how fast the run goes there is the schedule's.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

__all__ = ["Budget", "Channels", "Latency", "MACs", "Params", "Size", "Sparsity"]

_BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}


class Budget(ABC):
    """One quantity of a model and the value it is to end at.

    Attributes:
        quantity: ``"macs"``, ``"params"``, ``"channels"``, ``"bytes"``, ``"seconds"`` or ``"zeros"``.
    """

    quantity: ClassVar[str]

    @abstractmethod
    def goal(self, dense: float) -> float:
        """Value of the quantity at the end, for a model that starts at ``dense``."""

    def at(self, dense: float, share: float) -> float:
        """Value of the quantity once ``share`` of the way is behind: ``dense + share * (goal - dense)``.

        Args:
            dense: value of the quantity before compression.
            share: in [0, 1], from a schedule.

        Example:
            >>> MACs(0.4).at(dense=1000.0, share=0.5)
            700.0
        """
        return dense + share * (self.goal(dense) - dense)


@dataclass(frozen=True)
class _Remaining(Budget):
    """A share of the dense model's quantity stays."""

    remaining: float

    def __post_init__(self) -> None:
        if not 0.0 < self.remaining <= 1.0:
            name = type(self).__name__
            raise ValueError(
                f"`{name}(remaining={self.remaining})`: expected 0 < remaining <= 1, the share that stays, "
                f"never percent. To keep 40 % write `{name}(remaining=0.4)`."
            )

    @override
    def goal(self, dense: float) -> float:
        return self.remaining * dense


@dataclass(frozen=True)
class MACs(_Remaining):
    """``remaining`` of the multiply-accumulates of one forward pass stay.

    Args:
        remaining: in (0, 1].

    Raises:
        ValueError: unless ``0 < remaining <= 1``.

    Example:
        >>> MACs(0.5).goal(dense=1000.0)
        500.0
    """

    quantity: ClassVar[str] = "macs"


@dataclass(frozen=True)
class Params(_Remaining):
    """``remaining`` of the parameters stay.

    Args:
        remaining: in (0, 1].

    Raises:
        ValueError: unless ``0 < remaining <= 1``.
    """

    quantity: ClassVar[str] = "params"


@dataclass(frozen=True)
class Channels(_Remaining):
    """``remaining`` of the channels that may leave stay.

    Args:
        remaining: in (0, 1].

    Raises:
        ValueError: unless ``0 < remaining <= 1``.
    """

    quantity: ClassVar[str] = "channels"


@dataclass(frozen=True)
class Sparsity(Budget):
    """``amount`` of the weights end as zeros. ``dense`` is the share of zeros before, most often 0.

    Args:
        amount: in [0, 1]; the share of zeros.

    Raises:
        ValueError: unless ``0 <= amount <= 1``.

    Example:
        >>> Sparsity(0.9).at(dense=0.0, share=0.5)
        0.45
    """

    quantity: ClassVar[str] = "zeros"

    amount: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.amount <= 1.0:
            raise ValueError(
                f"`Sparsity(amount={self.amount})`: expected 0 <= amount <= 1, the share of zeros, never percent. "
                "For nine zeros out of ten write `Sparsity(0.9)`."
            )

    @override
    def goal(self, dense: float) -> float:
        return self.amount


@dataclass(frozen=True)
class Size(Budget):
    """The weights take at most ``limit`` bytes.

    Args:
        limit: ``"2 MB"`` (decimal: B, kB, MB, GB), ``"1.5 MiB"`` (binary: KiB, MiB, GiB), or an int: bytes.

    Raises:
        ValueError: ``limit`` is no size, or not above 0.

    Example:
        >>> Size("2 MB").bytes, Size("1.5 MiB").bytes, Size(4096).bytes
        (2000000, 1572864, 4096)
    """

    quantity: ClassVar[str] = "bytes"

    limit: int | str

    def __post_init__(self) -> None:
        if not isinstance(self.limit, (int, str)) or isinstance(self.limit, bool) or not self.bytes > 0:
            raise ValueError(_unreadable("Size", self.limit, "a size above 0", _BYTES, "2 MB"))

    @property
    def bytes(self) -> int:
        """The limit in bytes."""
        return int(self.limit if isinstance(self.limit, int) else round(_quantity("Size", self.limit, _BYTES, "2 MB")))

    @override
    def goal(self, dense: float) -> float:
        return float(self.bytes)


@dataclass(frozen=True)
class Latency(Budget):
    """One forward pass takes at most ``limit`` seconds, on the machine where it is measured.

    Args:
        limit: ``"4 ms"``, ``"250 us"``, ``"1.5 s"``, or a number: seconds.

    Raises:
        ValueError: ``limit`` is no time, or not above 0.

    Example:
        >>> Latency("4 ms").seconds, Latency(0.5).seconds
        (0.004, 0.5)
    """

    quantity: ClassVar[str] = "seconds"

    limit: float | str

    def __post_init__(self) -> None:
        if not isinstance(self.limit, (int, float, str)) or isinstance(self.limit, bool) or not self.seconds > 0.0:
            raise ValueError(_unreadable("Latency", self.limit, "a time above 0", _SECONDS, "4 ms"))

    @property
    def seconds(self) -> float:
        """The limit in seconds."""
        return _quantity("Latency", self.limit, _SECONDS, "4 ms") if isinstance(self.limit, str) else float(self.limit)

    @override
    def goal(self, dense: float) -> float:
        return self.seconds


def _quantity(kind: str, text: str, units: dict[str, int] | dict[str, float], example: str) -> float:
    """Read ``"2 MB"``: a number, then a unit; capitals and the space between do not matter."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zµ]+)\s*", text.replace("\u03bc", "µ"), flags=re.IGNORECASE)
    scales = {unit.lower(): scale for unit, scale in units.items()}
    if found is None or found[2].lower() not in scales:
        raise ValueError(_unreadable(kind, text, "a number and a unit", units, example))
    return float(found[1]) * scales[found[2].lower()]


def _unreadable(kind: str, limit: object, expected: str, units: dict[str, int] | dict[str, float], example: str) -> str:
    return f"`{kind}({limit!r})`: expected {expected} ({', '.join(units)}). Write for instance `{kind}({example!r})`."
