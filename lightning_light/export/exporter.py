"""Base class of file formats: write a file, and run it in the runtime of the device."""

from __future__ import annotations

import tempfile
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from typing_extensions import override

from lightning_light.example_input import ExampleInput
from lightning_light.export.copies import detached_copy, merged_copy
from lightning_light.export.dependence import needed_inputs
from lightning_light.export.inputs import Positional, cloned, first_sample
from lightning_light.int8 import Int8Weights
from lightning_light.isolation import plain_execution
from lightning_light.measure.latency import measure_latency, torch_threads
from lightning_light.runtime import Runtime

__all__ = ["Exporter"]

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

    @override
    def seconds(self, model: nn.Module, example: ExampleInput, threads: int) -> float:
        """Time ``model`` as exported with ``batch='one'``: the lowest median of several bursts of calls."""
        self.check()
        with plain_execution(), torch_threads(threads), tempfile.TemporaryDirectory() as folder:
            one = first_sample(cloned(example))
            needed = needed_inputs(Positional(detached_copy(model), one), one, any_batch=False)
            network, _ = merged_copy(model, one)
            copy = Positional(network, one, keep=needed)
            tensors, path = copy.tensors(one), Path(folder) / f"model{self.suffix}"
            self.write(copy, copy.tensors(cloned(one)), path)
            run = self.load(path)
            best = measure_latency(lambda: run(*tensors), runs=_RUNS).median
            bursts = min(max(round(_SECONDS / (_RUNS * best)), _BURSTS), 10 * _BURSTS)
            return min(
                best, *(measure_latency(lambda: run(*tensors), warmup=1, runs=_RUNS).median for _ in range(bursts))
            )
