"""Measure what a network costs: counted exactly, or of the file that is written for a runtime."""

from __future__ import annotations

import gc
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from lightning_light.budgets import Budget, Latency, Size
from lightning_light.example_input import ExampleInput
from lightning_light.export.exporter import Exporter, WrittenFile
from lightning_light.measure import file_bytes
from lightning_light.measure.latency import measure_latency, torch_threads
from lightning_light.nas.evaluation import computing
from lightning_light.quantization import Recipe

__all__ = ["Costs", "Meter", "runtime_of"]

Costs = dict[str, float]
"""Quantity, as in `Budget.quantity` -> value."""

_TURNS, _RUNS = 5, 20


class Meter:
    """Measure the quantities of several budgets.

    Without a runtime the bytes are those of the stored tensors. The latency of the first network is a median; those of
    the others are relative to it, by the least 10th percentiles of calls in turns, which other processes affect least.

    Args:
        budgets: each of another quantity.
        example: one call of the network.
        runtime: format and runtime of the written file; None if no budget is measured on a file.
        recipe: of the int8 file; None for a float file.
    """

    def __init__(
        self, budgets: Sequence[Budget], example: ExampleInput, runtime: Exporter | None, recipe: Recipe | None
    ) -> None:
        self._budgets, self._example, self._runtime, self._recipe = list(budgets), example, runtime, recipe
        self._first: tuple[WrittenFile, float] | None = None
        self._folder: Path | None = None

    @property
    def of_file(self) -> list[str]:
        """Quantities that are measured on a written file, or by running the network."""
        return [b.quantity for b in self._budgets if b.runs_model or (isinstance(b, Size) and self._runtime)]

    def count(self, network: nn.Module) -> Costs:
        """Count the quantities that depend on shapes alone."""
        counted = [budget for budget in self._budgets if budget.quantity not in self.of_file]
        return {budget.quantity: budget.measure(network, self._example) for budget in counted}

    def measure(self, make: Callable[[], nn.Module]) -> Costs:
        """Measure the quantities `of_file`.

        Args:
            make: returns the network, quantized by the recipe if there is one; it is written in place of a copy, and
                released before the file is loaded.

        Raises:
            TraceError: the format cannot express the network.
            ParityError: the outputs of the file differ.
        """
        if not self.of_file:
            return {}
        network = make()
        run = [budget for budget in self._budgets if budget.runs_model and runtime_of(budget) is None]
        found = {budget.quantity: budget.measure(network, self._example) for budget in run}  # by running it itself
        if self._runtime is None:
            return found
        with computing(network, self._recipe):
            file = self._runtime.write_in_place(network, self._example, self._new_path())
        del network
        gc.collect()  # networks that were exported are in cycles of references
        found[Size.quantity] = float(file_bytes(file.path))
        if any(runtime_of(budget) is not None for budget in self._budgets):
            with torch_threads(self._threads):
                found[Latency.quantity] = self._in_turns(file)
        return {quantity: value for quantity, value in found.items() if quantity in self.of_file}

    def _new_path(self) -> Path:
        """Return a path for a file: the first one is kept, the others replace each other."""
        assert self._runtime is not None  # of `measure`
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp())
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder / f"{'first' if self._first is None else 'other'}{self._runtime.suffix}"

    def _in_turns(self, file: WrittenFile) -> float:
        """Seconds of a call of ``file``, on the scale of the first network's measurement."""
        if self._first is None:
            self._first = file, measure_latency(file.load(), runs=_TURNS * _RUNS, threads=self._threads).median
            return self._first[1]
        least = [float("inf")] * 2
        for _ in range(_TURNS):
            least = list(map(min, least, map(self._low_percentile, (self._first[0], file))))
        return self._first[1] * least[1] / least[0]

    def _low_percentile(self, file: WrittenFile) -> float:
        """Load ``file``, for this turn only: there is one file in memory at a time."""
        return measure_latency(file.load(), warmup=3, runs=_RUNS, threads=self._threads).p10

    @property
    def _threads(self) -> int:
        return next((budget.threads for budget in self._budgets if isinstance(budget, Latency)), 1)


def runtime_of(budget: Budget) -> Exporter | None:
    """Return the format and runtime of the file that a budget of latency is measured on; None without a file."""
    return budget.runtime if isinstance(budget, Latency) and isinstance(budget.runtime, Exporter) else None
