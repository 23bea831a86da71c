"""TorchScript for the lite interpreter, with int8 kernels: the same ``.ptl`` files, a quarter of the size."""

from __future__ import annotations

import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from typing_extensions import override

from lightning_light.errors import UnsupportedError
from lightning_light.export.exporter import Exporter
from lightning_light.export.inputs import Positional
from lightning_light.export.parity import Tolerance
from lightning_light.export.torchscript_lite import TorchScriptLite, write_lite
from lightning_light.int8 import QUANTIZED_TENSORS_ARE_DEPRECATED, Kernels, rounders_of

__all__ = ["TorchScriptInt8"]

_FLOAT = TorchScriptLite()


@dataclass(frozen=True)
class TorchScriptInt8(Exporter):
    """Trace the network as it runs on int8 kernels, freeze, save for the lite interpreter.

    For a network whose numbers are rounded: in a Trainer with `QuantizationAwareTraining`, or within
    `fake_quantized`. The kernels are those of the recipe's engine, and the report names the layers that have none.
    Integer sums and float sums round differently where a number lies halfway, so the file may be off the rounded
    module by some steps of the output's grid.

    Example:
        >>> TorchScriptInt8(steps=4)
        TorchScriptInt8(steps=4)

    Args:
        steps: how many steps of its own grid an output may be off, at most, in units of its scale.

    Raises:
        ValueError: ``steps`` is below 0.
    """

    suffix: ClassVar[str] = ".ptl"

    steps: int = 8

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"`TorchScriptInt8(steps={self.steps})`: expected an integer >= 0. Usual is 8.")

    @override
    def check(self) -> None:
        _FLOAT.check()

    @override
    def runtime(self) -> str:
        return f"{_FLOAT.runtime()}, int8 kernels"

    @override
    def write(self, model: Positional, tensors: tuple[Any, ...], path: Path) -> dict[str, Any]:
        name = type(model.model).__name__
        rounders = rounders_of(model.model)
        if len(rounders) != 1:
            raise UnsupportedError(
                f"`TorchScriptInt8()` on `{name}`: expected a network whose numbers are rounded, found {len(rounders)} "
                "that round them. Train it with `QuantizationAwareTraining`, and export in the same Trainer or within "
                "`with fake_quantized(module):`; for a float file write `TorchScriptLite()`."
            )
        with rounders[0].on_kernels(lambda: model(*tensors)) as kernels:
            self._check_engine(kernels, name)
            frozen, version, branches = write_lite(model, tensors, path, kernels.packed, {"engine": kernels.engine})
        operations = Counter(node.kind() for node in frozen.inlined_graph.nodes())
        if kernels.left_float:
            warnings.warn(
                f"`TorchScriptInt8()` on `{name}`: layers that stay float: {kernels.left_float}.", stacklevel=2
            )
        return {
            "torch": torch.__version__,
            "bytecode_version": version,
            "engine": kernels.engine,
            "int8_layers": kernels.layers,
            "left_float": kernels.left_float,
            "output_scales": kernels.scales,
            "int8_operations": {kind: count for kind, count in operations.items() if kind.startswith("quantized::")},
            "built_in_values": branches,
        }

    @override
    def allowed(self, tolerance: Tolerance, details: Mapping[str, Any]) -> Tolerance:
        scales = [scale for scale in details["output_scales"] if scale is not None]
        largest = max(scales, default=0.0)
        return Tolerance(max(tolerance.absolute, (self.steps + 0.01) * largest), tolerance.relative)

    @override
    def load(self, path: Path) -> Callable[..., Any]:
        with zipfile.ZipFile(path) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("/extra/engine")]
            engine = archive.read(name).decode()
        with _engine(engine):  # packs the weights anew, for the engine that is set
            network = _FLOAT.load(path)

        def run(*tensors: Any) -> Any:
            with _engine(engine):
                return network(*tensors)

        return run

    def _check_engine(self, kernels: Kernels, name: str) -> None:
        if not kernels.layers:
            raise UnsupportedError(
                f"`TorchScriptInt8()` on `{name}`: expected layers that run on int8 kernels, found none"
                f"{f': {kernels.left_float}' if kernels.left_float else ', its numbers are not rounded yet'}. Train "
                "until rounding has begun, or write a float file: `TorchScriptLite()`."
            )


@contextmanager
def _engine(name: str) -> Iterator[None]:
    """A file that was made for one engine's ranges overflows in another's."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", QUANTIZED_TENSORS_ARE_DEPRECATED)
            yield
    finally:
        torch.backends.quantized.engine = before
