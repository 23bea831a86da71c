"""Measure what a network costs: counted exactly, or of the file that is written for a runtime."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from lightning_light.budgets import Budget, Latency, Size
from lightning_light.example_input import ExampleInput
from lightning_light.export.exporter import Exporter
from lightning_light.export.functional import export_model
from lightning_light.export.loading import load_exported
from lightning_light.measure.latency import measure_latency, torch_threads
from lightning_light.nas.evaluation import computing
from lightning_light.nested import tensors_in
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
        self._first: tuple[Callable[[], object], float] | None = None

    @property
    def of_file(self) -> list[str]:
        """Quantities that are measured on a written file, or by running the network."""
        return [b.quantity for b in self._budgets if b.runs_model or (isinstance(b, Size) and self._runtime)]

    def count(self, network: nn.Module) -> Costs:
        """Count the quantities that depend on shapes alone."""
        counted = [budget for budget in self._budgets if budget.quantity not in self.of_file]
        return {budget.quantity: budget.measure(network, self._example) for budget in counted}

    def measure(self, network: nn.Module) -> Costs:
        """Measure the quantities `of_file`.

        Args:
            network: quantized by the recipe, if there is one.

        Raises:
            TraceError: the format cannot express the network.
            ParityError: the outputs of the file differ.
        """
        found = {b.quantity: b.measure(network, self._example) for b in self._budgets if self._runs(b)}
        return {**found, **self._of_file(network)} if self._runtime is not None and self.of_file else found

    def _runs(self, budget: Budget) -> bool:
        """Whether ``budget`` is measured by running the network itself."""
        return budget.runs_model and runtime_of(budget) is None

    def _of_file(self, network: nn.Module) -> Costs:
        """Write the file; return its bytes and the seconds of a call, where a budget limits them."""
        assert self._runtime is not None  # of `measure`
        sample = self._example.small(1)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"network{self._runtime.suffix}"
            with computing(network, self._recipe):
                report = export_model(network, sample, path, exporter=self._runtime, batch="one", latency_runs=1)
            found = {Size.quantity: float(report.bytes)}
            if any(runtime_of(budget) is not None for budget in self._budgets):
                with torch_threads(self._threads):
                    run = load_exported(path, exporter=self._runtime, batch="one")
                tensors = list(tensors_in((sample.args, sample.kwargs)))
                found[Latency.quantity] = self._in_turns(lambda: run(*tensors))
        gc.collect()  # the networks of the export are in cycles of references
        return {quantity: value for quantity, value in found.items() if quantity in self.of_file}

    def _in_turns(self, run: Callable[[], object]) -> float:
        """Seconds of ``run``, on the scale of the first network's measurement."""
        if self._first is None:
            self._first = run, measure_latency(run, runs=_TURNS * _RUNS, threads=self._threads).median
            return self._first[1]
        first, seconds = self._first
        least = [float("inf")] * 2
        for _ in range(_TURNS):
            timed = [measure_latency(one, warmup=3, runs=_RUNS, threads=self._threads).p10 for one in (first, run)]
            least = list(map(min, least, timed))
        return seconds * least[1] / least[0]

    @property
    def _threads(self) -> int:
        return next((budget.threads for budget in self._budgets if isinstance(budget, Latency)), 1)


def runtime_of(budget: Budget) -> Exporter | None:
    """Return the format and runtime of the file that a budget of latency is measured on; None without a file."""
    return budget.runtime if isinstance(budget, Latency) and isinstance(budget.runtime, Exporter) else None
