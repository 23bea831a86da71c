"""How long one call takes, on this machine, now."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

__all__ = ["Latency", "measure_latency", "torch_threads"]


@dataclass(frozen=True)
class Latency:
    """Wall-clock seconds of one call, over many.

    Attributes:
        median: half of the calls were faster.
        p10: a tenth of the calls were faster.
        p90: nine tenths of the calls were faster; far above ``median`` the machine was busy.
        runs: calls that were timed.
        threads: of torch's own kernels during the calls; another runtime has its own setting.
    """

    median: float
    p10: float
    p90: float
    runs: int
    threads: int


def measure_latency(
    run: Callable[[], object], *, warmup: int = 10, runs: int = 50, threads: int | None = None
) -> Latency:
    """Time ``run()``, one call after the other.

    Args:
        run: does the whole work before it returns; on a GPU it ends with ``torch.cuda.synchronize()``.
        warmup: calls before the clock starts (caches, allocations, lazy initialization).
        runs: calls that are timed.
        threads: for torch's kernels, put back afterwards; None leaves them as they are.

    Raises:
        ValueError: ``warmup`` is negative, or ``runs`` or ``threads`` below 1.

    Example:
        >>> latency = measure_latency(lambda: sum(range(1000)), warmup=1, runs=5)
        >>> latency.runs, 0.0 < latency.p10 <= latency.median <= latency.p90
        (5, True)
    """
    if warmup < 0 or runs < 1 or (threads is not None and threads < 1):
        raise ValueError(
            f"`measure_latency(warmup={warmup}, runs={runs}, threads={threads})`: expected warmup >= 0, runs >= 1 and "
            "threads >= 1 or None. Usual are `warmup=10, runs=50, threads=1`."
        )
    with torch_threads(threads):
        for _ in range(warmup):
            run()
        seconds = sorted(_timed(run) for _ in range(runs))
        used = torch.get_num_threads()
    return Latency(_quantile(seconds, 0.5), _quantile(seconds, 0.1), _quantile(seconds, 0.9), runs, used)


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _quantile(ascending: list[float], share: float) -> float:
    """Linear between the two nearest values, as `numpy.quantile`."""
    position = share * (len(ascending) - 1)
    below = int(position)
    above = min(below + 1, len(ascending) - 1)
    return ascending[below] + (position - below) * (ascending[above] - ascending[below])


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """As many threads for torch's kernels, for a while; None leaves them as they are."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)
