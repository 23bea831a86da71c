"""Export to a ``.pt2`` file of `torch.export`: the network as a graph that torch alone loads."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_light.errors import UnsupportedError
from lightning_light.export.exporter import Exporter
from lightning_light.export.inputs import Positional
from lightning_light.export.int8 import quantizer_of
from lightning_light.export.program import flat_tensors, quiet_torch, traced
from lightning_light.int8 import Int8Weights
from lightning_light.validation import validated

__all__ = ["TorchExport"]


@validated
@dataclass(frozen=True)
class TorchExport(Exporter):
    """Export by `torch.export` to a self-contained file of graph and weights, for torch in Python and its compilers.

    Loaded by ``torch.export.load("model.pt2").module()``, with neither this package nor the network's own code; the
    module takes the tensors that the report lists as inputs, and returns a tuple of the output tensors. A
    fake-quantized network is refused: torch runs no int8 kernels from such a file.
    """

    suffix: ClassVar[str] = ".pt2"

    @override
    def check(self) -> None:
        """Every torch that this package supports has the format."""

    @override
    def check_int8(self, weights: Int8Weights | None) -> None:
        if weights is not None:
            raise UnsupportedError(_no_int8(f"MobileExport(..., exporter={self})", "`QuantizationAwareTraining`"))

    @override
    def runtime(self) -> str:
        return f"torch.export of torch {torch.__version__}"

    @override
    def write(self, model: Positional, tensors: tuple[Any, ...], path: Path) -> dict[str, Any]:
        if quantizer_of(str(self), model.model) is not None:
            raise UnsupportedError(_no_int8(f"{self}", f"a fake-quantized `{type(model.model).__name__}`"))
        program = traced(str(self), model, tensors)
        for node in program.graph.graph.nodes:  # lines of code with their paths, and modules of the user's
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
                node.meta.pop(key, None)
        program.graph.example_inputs = tuple(map(torch.zeros_like, program.example)), {}  # not a sample of the user's
        content = io.BytesIO()  # torch ends the process where its own writer cannot write, to a full disk for instance
        with quiet_torch():
            torch.export.save(program.graph, content)
        path.write_bytes(content.getbuffer())
        operators = {str(node.target) for node in program.graph.graph.nodes if node.op == "call_function"}
        return {
            "torch": torch.__version__,
            "inputs": program.inputs,
            "outputs": program.outputs,
            "operators": sorted(operators),
        }

    @override
    def load(self, path: Path) -> Callable[..., Any]:
        with quiet_torch():
            network = torch.export.load(path).module()

        def run(*tensors: Any) -> list[Tensor]:
            return flat_tensors(network(*flat_tensors(tensors)))

        return run


def _no_int8(call: str, found: str) -> str:
    return (
        f"`{call}`: expected a float network, found {found}: a `.pt2` file runs in float. Export int8 to `.ptl`, "
        "`.pte` or `.onnx`, or export before the quantization."
    )
