"""Estimate the latency of a network's file from a table of its operators, measured in the runtime and kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import nn

from lightning_light.atomic import atomic_write
from lightning_light.budgets import Budget, Latency
from lightning_light.measure.latency import processor
from lightning_light.measure.latency_operators import COPIES, Operator, OperatorCalls, operator_calls, repeated
from lightning_light.progress_bar import with_progress_bar
from lightning_light.validation import PositiveFloat

if TYPE_CHECKING:
    from lightning_light.example_input import ExampleInput
    from lightning_light.runtime import Runtime

__all__ = ["CACHE", "LatencyTable", "TimedFiles", "lowered", "measured_text", "quantity"]

CACHE = "LIGHTNING_LIGHT_CACHE"
"""Environment variable: folder of the measured tables; ``~/.cache/lightning_light`` without it."""

_STEP = 0.99  # by at least which the limit of estimates is lowered, where the measured file is above it
_FEW = 4  # operators, that need no progress bar
_DISTINCT = 0.05  # files whose operators take nearly the same time do not determine the slope


class TimedFiles(TypedDict):
    """What a plan depends on, in plain types for checkpoints.

    Attributes:
        seconds: key of an operator, or digest of a network -> measured seconds.
        estimated: digest of each network by which estimates are corrected -> sum of its operators, in seconds.
    """

    seconds: dict[str, PositiveFloat]
    estimated: dict[str, PositiveFloat]


class LatencyTable:
    """Seconds of operators, each measured once per machine, processor, runtime and number of threads.

    An estimate is the sum over the operators, corrected by the line through the measured files of two networks
    (`correct_by`): operators are not timed where they run in the network, and not all are in the table.

    Args:
        budget: measures files.
        runtime: that of ``budget``.
        known: what an earlier plan of this run has measured; it comes before what is on disk.
    """

    @classmethod
    def of(cls, budget: object, known: TimedFiles | None = None) -> LatencyTable | None:
        """Return the table for a budget of latency in a runtime; None for other budgets."""
        if isinstance(budget, Latency) and budget.runtime is not None:
            return cls(budget, budget.runtime, known)
        return None

    def __init__(self, budget: Latency, runtime: Runtime, known: TimedFiles | None = None) -> None:
        self._budget, self._runtime = budget, runtime
        self._used: dict[str, float] = dict(known["seconds"]) if known else {}
        self._estimated: dict[str, float] = dict(known["estimated"]) if known else {}
        self._disk = _Disk(runtime, budget.threads)

    @property
    def used(self) -> TimedFiles:
        """Everything that estimates and files have depended on."""
        return {"seconds": dict(self._used), "estimated": dict(self._estimated)}

    @property
    def is_corrected(self) -> bool:
        """Whether the files of two networks correct the estimates."""
        return len(self._estimated) > 1

    def correct_by(self, model: nn.Module, example: ExampleInput) -> float:
        """Measure the file of ``model``, correct all estimates by it, and return its seconds."""
        self._budget.check_runtime(model, example)
        calls = operator_calls(model, example)
        self._estimated[calls.digest] = self._sum(calls)
        return self._file(calls, model, example)

    def estimate(self, model: nn.Module, example: ExampleInput) -> float:
        """Estimate the seconds of the file of ``model``."""
        offset, slope = self._line()
        return offset + slope * self._sum(operator_calls(model, example))

    def estimate_part(self, module: nn.Module, example: ExampleInput) -> float:
        """Estimate what ``module`` adds to the seconds of a network that it is a part of."""
        return self._line()[1] * self._sum(operator_calls(module, example))

    def file(self, model: nn.Module, example: ExampleInput) -> float:
        """Return the seconds of the file of ``model``; networks of one structure are measured once."""
        return self._file(operator_calls(model, example), model, example)

    def part(self, module: nn.Module, example: ExampleInput) -> float:
        """Return the seconds that ``module`` takes inside a file, as measured in a file of several copies."""
        return self.file(repeated(module), example) / COPIES

    def _file(self, calls: OperatorCalls, model: nn.Module, example: ExampleInput) -> float:
        found = self._known(calls.digest)
        if found is None:
            found = self._used[calls.digest] = self._budget.measure(model, example)
            self._disk.add({calls.digest: found})
        return found

    def _known(self, key: str) -> float | None:
        """Return the seconds under ``key``, if they were measured."""
        if key not in self._used and key in self._disk.seconds:
            self._used[key] = self._disk.seconds[key]
        return self._used.get(key)

    def _sum(self, calls: OperatorCalls) -> float:
        self._measure(calls.operators)
        return sum(count * self._used[operator.key] for operator, count in calls.operators.items())

    def _measure(self, operators: Iterable[Operator]) -> None:
        missing, new = [operator for operator in operators if self._known(operator.key) is None], {}
        shown = len(missing) >= _FEW
        for operator in with_progress_bar(missing, len(missing), "Timing operators", shown=shown):
            module, call = operator.copies()
            new[operator.key] = self._runtime.seconds(module, call, self._budget.threads) / COPIES
        if new:
            self._used |= new
            self._disk.add(new)

    def _line(self) -> tuple[float, float]:
        """Return offset and slope from the sum over operators to the seconds of a file."""
        points = sorted((total, self._used[digest]) for digest, total in self._estimated.items() if total > 0.0)
        if not points:
            return 0.0, 1.0
        (low, fast), (high, slow) = points[0], points[-1]
        if low < (1.0 - _DISTINCT) * high and fast < slow:
            slope = (slow - fast) / (high - low)
            return slow - slope * high, slope
        return 0.0, slow / high


def quantity(budget: Budget, model: nn.Module, example: ExampleInput, table: LatencyTable | None) -> float:
    """Measure the quantity of ``budget``; with a table, of files, of which those of one structure are measured once."""
    return budget.measure(model, example) if table is None else table.file(model, example)


def lowered(target: float, estimated: float, seconds: float, limit: float) -> float:
    """Return the next limit of the estimates, where a plan of ``estimated`` seconds was measured above ``limit``."""
    return min(target, estimated) * min(limit / seconds, _STEP)


def measured_text(seconds: float, estimated: float | None) -> str:
    """Describe what a file took, and what was estimated; an empty string where none was measured.

    Example:
        >>> measured_text(0.00295, 0.003)
        'file 2.95 ms measured, 3 ms estimated, '
    """
    if estimated is None:
        return ""
    return f"file {1e3 * seconds:.3g} ms measured, {1e3 * estimated:.3g} ms estimated, "


class _Disk:
    """Table of one machine and runtime in a file of the user's cache folder."""

    def __init__(self, runtime: Runtime, threads: int) -> None:
        self._of = {
            "machine": platform.node(),
            "processor": processor(),
            "runtime": f"{runtime!r}, {runtime.runtime()}",
            "torch": torch.__version__,
            "threads": threads,
        }
        name = hashlib.sha256(json.dumps(self._of, sort_keys=True).encode()).hexdigest()[:16]
        folder = os.environ.get(CACHE) or Path.home() / ".cache" / "lightning_light"
        self._path = Path(folder) / "latency" / f"{type(runtime).__name__}-{name}.json"
        self.seconds = self._read()

    def add(self, seconds: Mapping[str, float]) -> None:
        """Store measurements, beside those that other processes have stored since."""
        self.seconds = {**self._read(), **seconds}
        try:
            with atomic_write(self._path) as part:
                part.write_text(json.dumps({**self._of, "seconds": self.seconds}, indent=1))
        except OSError as error:
            warnings.warn(
                f"Latency table {str(self._path)!r}: expected a folder that can be written to, found {error}. It is "
                f"measured again in every run; set the environment variable {CACHE} to another folder.",
                stacklevel=2,
            )

    def _read(self) -> dict[str, float]:
        if not self._path.exists():
            return {}
        try:
            found = json.loads(self._path.read_text())["seconds"]
            if not all(isinstance(key, str) and isinstance(value, float) and value > 0 for key, value in found.items()):
                raise ValueError("values that are no times")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(
                f"Latency table {str(self._path)!r}: expected measured seconds, found a damaged file ({error!r}). They "
                "are measured again.",
                stacklevel=2,
            )
            return {}
        return dict(found)
