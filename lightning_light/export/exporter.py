"""Base class of file formats: write a file, and run it in the runtime of the device."""

from __future__ import annotations

import tempfile
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from typing_extensions import override

from lightning_light.copies import copy_network
from lightning_light.example_input import ExampleInput
from lightning_light.export.copies import detached, merged
from lightning_light.export.dependence import needed_inputs
from lightning_light.export.inputs import Positional, cloned, first_sample
from lightning_light.export.int8 import check_details
from lightning_light.export.parity import Tolerance, compare_outputs
from lightning_light.int8 import Int8Weights
from lightning_light.isolation import plain_execution
from lightning_light.measure.latency import measure_latency, torch_threads
from lightning_light.runtime import Runtime

__all__ = ["Exporter", "WrittenFile"]

_RUNS, _BURSTS, _SECONDS = 5, 16, 0.4  # short bursts, as other processes interrupt long ones


class Exporter(Runtime):
    """One file format and its runtime; a frozen dataclass, whose fields are the format's options.

    A new format is one file with one subclass; comparison, metrics, latency and the report are done by `export_model`.
    """

    suffix: ClassVar[str]
    """Suffix of the files of this format, such as ``.ptl``."""

    @property
    def largest_batch(self) -> int | None:
        """The largest batch of a file that is exported for ``batch='any'``; None for no limit."""
        return None

    def check_int8(self, weights: Int8Weights | None) -> None:  # most formats take what comes
        """Check, before anything is trained, that the format supports the int8 weights.

        Args:
            weights: the quantization of the weights; None: nothing in the Trainer quantizes them.

        Raises:
            UnsupportedError: names a supported quantization.
        """

    @abstractmethod
    def write(self, model: Positional, tensors: tuple[Any, ...], path: Path) -> dict[str, Any]:
        """Write ``model`` to ``path``.

        Args:
            model: a copy on the CPU in evaluation mode that this call may change; ``model.batched`` marks the tensors
                whose first dimension, the batch, is dynamic.
            tensors: an example call of ``model``, one sample.
            path: of the file; the folder exists.

        Returns:
            Details for the report, in plain types. Of an int8 file ``output_scales``, the quantization scale of each
            output, 0.0 where it is not quantized: differences are counted in them.

        Raises:
            TraceError: the format cannot express the model.
        """

    @abstractmethod
    def load(self, path: Path) -> Callable[..., Any]:
        """Load a written file in its runtime, as a function from positional tensors to the model's outputs.

        Outputs may be a flat list, with dicts in the order of their keys. The runtime uses as many threads as torch.
        """

    def write_in_place(self, network: nn.Module, example: ExampleInput, path: Path) -> WrittenFile:
        """Write ``network`` itself for one sample at a time, for a measurement: it is of no further use.

        One copy of the network less than `export_model` needs for the file, and one less for the comparison.

        Raises:
            TraceError: the format cannot express the network.
        """
        self.check()
        with plain_execution():
            one, network = first_sample(cloned(example)), detached(network)
            needed = needed_inputs(Positional(network, one), one, any_batch=False)
            model = Positional(network, one, keep=needed)
            outputs = model(*model.tensors(cloned(one)))
            merged(network)
            details = self.write(model, model.tensors(cloned(one)), path)
            check_details(repr(self), network, details)
            for tensor in (*network.parameters(), *network.buffers()):
                tensor.data = tensor.data.new_empty(0)  # exporters keep parts of the last graph in global variables
        return WrittenFile(self, path, model.tensors(one), outputs, details.get("output_scales"))

    @override
    def seconds(self, model: nn.Module, example: ExampleInput, threads: int) -> float:
        """Time ``model`` as exported with ``batch='one'``: the lowest median of several bursts of calls."""
        with plain_execution(), torch_threads(threads), tempfile.TemporaryDirectory() as folder:
            run = self.write_in_place(copy_network(model), example, Path(folder) / f"model{self.suffix}").load()
            best = measure_latency(run, runs=_RUNS).median
            bursts = min(max(round(_SECONDS / (_RUNS * best)), _BURSTS), 10 * _BURSTS)
            return min(best, *(measure_latency(run, warmup=1, runs=_RUNS).median for _ in range(bursts)))


@dataclass(frozen=True, eq=False)
class WrittenFile:
    """A file of one sample at a time, and what the network that it was written from computes.

    Attributes:
        exporter: that has written it.
        path: of the file.
        tensors: one sample, as the file takes it.
        outputs: of the network on that sample.
        scales: of the outputs of an int8 file.
    """

    exporter: Exporter
    path: Path
    tensors: tuple[Any, ...]
    outputs: Any
    scales: list[float] | None

    def load(self) -> Callable[[], Any]:
        """Load the file in its runtime, as a function of nothing that runs it on the sample.

        Raises:
            ParityError: its outputs are others.
        """
        run = self.exporter.load(self.path)
        compare_outputs(lambda _: self.outputs, lambda call: run(*call), [(1, self.tensors)], Tolerance(), self.scales)
        return lambda: run(*self.tensors)
