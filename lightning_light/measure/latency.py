"""Time the calls of a function on this machine, and name its processor."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from typing_extensions import override

from lightning_light.formatting import DataTable, Tabular
from lightning_light.validation import NonNegativeInt, PositiveInt, validated

__all__ = ["LatencyStats", "measure_latency", "processor", "torch_threads"]


@dataclass(frozen=True)
class LatencyStats(Tabular):
    """Wall-clock seconds per call, over many calls.

    Attributes:
        median: the median.
        p10: the 10th percentile.
        p90: the 90th percentile; far above ``median`` if the machine was busy.
        runs: number of timed calls.
        threads: number of threads of torch's own kernels during the calls; another runtime has its own setting.
    """

    median: float
    p10: float
    p90: float
    runs: int
    threads: int

    @override
    def tables(self) -> list[DataTable]:
        """Return one line."""
        times = (f"{1e3 * seconds:.3g} ms" for seconds in (self.median, self.p10, self.p90))
        headers = ("latency", "p10", "p90", "runs", "threads")
        return [DataTable(headers, ((*times, str(self.runs), str(self.threads)),))]


@validated
def measure_latency(
    run: Callable[[], object],
    *,
    warmup: NonNegativeInt = 10,
    runs: PositiveInt = 50,
    threads: PositiveInt | None = None,
) -> LatencyStats:
    """Time ``runs`` calls of ``run()``, one after the other.

    Args:
        run: does all its work before it returns; on a GPU it ends with ``torch.cuda.synchronize()``.
        warmup: untimed calls before (caches, allocations, lazy initialization).
        runs: timed calls.
        threads: number of threads for torch's kernels, restored afterwards; None leaves it as it is.

    Raises:
        ValueError: ``warmup`` is negative, or ``runs`` or ``threads`` below 1.

    Example:
        >>> latency = measure_latency(lambda: sum(range(1000)), warmup=1, runs=5)
        >>> latency.runs, 0.0 < latency.p10 <= latency.median <= latency.p90
        (5, True)
    """
    with torch_threads(threads):
        for _ in range(warmup):
            run()
        seconds = sorted(_timed(run) for _ in range(runs))
        used = torch.get_num_threads()
    return LatencyStats(_quantile(seconds, 0.5), _quantile(seconds, 0.1), _quantile(seconds, 0.9), runs, used)


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _quantile(ascending: list[float], q: float) -> float:
    """Interpolate linearly between the two nearest values, as `numpy.quantile` does."""
    position = q * (len(ascending) - 1)
    below = int(position)
    above = min(below + 1, len(ascending) - 1)
    return ascending[below] + (position - below) * (ascending[above] - ascending[below])


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Use ``count`` threads for torch's kernels inside; None leaves the number as it is."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)


def processor() -> str:
    """Name the processor: on Linux, where `platform` has no name, from the kernel's list."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
