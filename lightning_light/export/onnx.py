"""Export to ONNX, for ONNX Runtime and vendors' converters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_light.errors import TraceError
from lightning_light.export.exporter import Exporter
from lightning_light.export.extras import check_pair, need, version_of
from lightning_light.export.inputs import Positional
from lightning_light.export.int8 import traced_int8
from lightning_light.export.program import FAILURES, Program, advice, flat_tensors, quiet_torch
from lightning_light.int8 import QDQConstraints
from lightning_light.validation import Range, validated

__all__ = ["ONNX"]

_PAIRS = (("0.7", "2.13"), ("0.7", "2.15"))  # releases of onnxscript and torch that the tests have passed on
_INT8 = QDQConstraints("onnxruntime", signed=False)
_NUMPY_LACKS = frozenset({torch.bfloat16})


@validated
@dataclass(frozen=True)
class ONNX(Exporter):
    """Export by `torch.export` and onnxscript; the file is run by ONNX Runtime on the CPU.

    One file, weights included. Inputs have the names of the arguments of ``forward``, outputs those of the keys of the
    dict that it returns. ONNX Runtime folds batch norms when it loads the file. Needs
    ``pip install lightning-light[onnx]``.

    Args:
        opset: version of ONNX's operators; older readers need a lower one.
        dynamic_batch: whether files that are exported for ``batch='any'`` have a dynamic batch size; without it,
            export for ``batch='one'``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
    """

    suffix: ClassVar[str] = ".onnx"

    opset: Annotated[int, Range(18, 23)] = 18
    dynamic_batch: bool = True

    @property
    @override
    def largest_batch(self) -> int | None:
        return None if self.dynamic_batch else 1

    @override
    def check(self) -> None:
        need(str(self), "onnx", "onnx", "onnxscript", "onnxruntime")
        check_pair(str(self), "onnxscript", version_of("onnxscript"), torch.__version__, _PAIRS)

    @override
    def runtime(self) -> str:
        return f"onnxruntime {version_of('onnxruntime')}, CPU"

    @override
    def write(self, model: Positional, tensors: tuple[Any, ...], path: Path) -> dict[str, Any]:
        program, int8 = traced_int8(str(self), model, tensors, _INT8)
        _check_types(str(self), model, program)
        try:
            translated = self._translated(program)
        except (torch.onnx.OnnxExporterError, *FAILURES) as error:
            raise TraceError(advice(str(self), model, error.__cause__ or error)) from error
        _name_batch(translated.model)
        _name_apart(translated.model)
        _without_traces(translated.model)
        _save(translated.model, path)
        return {
            "torch": torch.__version__,
            "onnxscript": version_of("onnxscript"),
            "opset": self.opset,
            "inputs": program.inputs,
            "outputs": program.outputs,
            "operators": sorted({node.op_type for node in translated.model.graph}),
            **int8,
        }

    @override
    def load(self, path: Path) -> Callable[..., Any]:
        return _Session(path)

    def _translated(self, program: Program) -> Any:
        with quiet_torch(), _quiet_registry():
            return torch.onnx.export(
                _with_plain_attention(program.graph),
                program.example,
                dynamo=True,
                verbose=False,
                external_data=False,
                opset_version=self.opset,
                input_names=program.inputs,
                output_names=program.outputs,
            )


def _with_plain_attention(graph: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Compute attention by matrix products where it is not over four dimensions, which ONNX's translation expects."""
    fused = torch.ops.aten.scaled_dot_product_attention.default
    calls = graph.graph.find_nodes(op="call_function", target=fused)
    if all(call.meta["val"].dim() == 4 for call in calls):
        return graph
    found: torch.export.ExportedProgram = graph.run_decompositions({fused: _plain_attention})
    return found


def _plain_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **options: Any
) -> Tensor:
    """As the fused operator, from matrix products and a softmax."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    plain = torch.ops.aten._scaled_dot_product_attention_math
    result: Tensor = plain(query, key, value, attn_mask, *args, **options)[0]
    return result


class _Session:
    """A loaded file."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        state = vars(onnxruntime.capi.onnxruntime_pybind11_state).values()
        self._errors = tuple(kind for kind in state if isinstance(kind, type) and issubclass(kind, Exception))
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except self._errors as error:
            raise TraceError(
                f"A file of `ONNX()`: expected operations that ONNX Runtime has kernels for, found "
                f"others: {str(error).strip().splitlines()[0]} Most are for float32: export `model.float()`."
            ) from error
        self._names = [value.name for value in self._session.get_inputs()]

    def __call__(self, *tensors: Any) -> list[Tensor]:
        arrays = [tensor.detach().numpy() for tensor in flat_tensors(tensors)]
        try:
            found = self._session.run(None, dict(zip(self._names, arrays, strict=True)))
        except self._errors as error:  # bare Exceptions, all of them
            raise RuntimeError(str(error)) from error
        return [torch.from_numpy(array) for array in found]


def _check_types(call: str, model: Positional, program: Program) -> None:
    """ONNX Runtime is called with arrays of NumPy."""
    values = [node.meta["val"] for node in program.graph.graph.find_nodes(op="output")[0].args[0]]
    if lacking := sorted({str(value.dtype) for value in [*program.example, *values]} & set(map(str, _NUMPY_LACKS))):
        raise TraceError(
            f"`{call}` on `{type(model.model).__name__}`: expected inputs and outputs of types that NumPy has, found "
            f"{', '.join(lacking)}. Export `model.float()`."
        )


def _name_batch(model: Any) -> None:
    """Name the dynamic dimension ``batch``."""
    import onnx_ir

    values = [*model.graph.inputs, *(value for node in model.graph.all_nodes() for value in node.outputs)]
    first = [str(value.shape[0]) for value in model.graph.inputs if value.shape and not isinstance(value.shape[0], int)]
    for value in values:
        for place, size in enumerate(value.shape or ()):
            if first and not isinstance(size, int) and str(size) == first[0]:
                value.shape[place] = onnx_ir.SymbolicDim("batch")


def _name_apart(model: Any) -> None:
    """Rename inner values that have the name of an input or output."""
    ends = [*model.graph.inputs, *model.graph.outputs]
    taken, kept = {value.name for value in ends}, {id(value) for value in ends}
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if value.name in taken and id(value) not in kept:
                value.name = f"{value.name}_within"


def _without_traces(model: Any) -> None:
    """Remove the metadata of each operator: lines of the user's code with their paths, half of a file; and its node.

    Of the traced program: a rule of onnxscript keeps the last operator that it has looked at until the next export.
    """
    nodes = list(model.graph.all_nodes())
    values = [*model.graph.inputs, *model.graph.initializers.values(), *(one for node in nodes for one in node.outputs)]
    for part in (*nodes, *values):
        part.metadata_props.clear()
        part.meta.clear()


def _save(model: Any, path: Path) -> None:
    """Write the file one weight after the other, and release the weights.

    A message of protobuf that holds all of them, and its bytes, are two more copies of the network. The weights would
    stay in memory until the next export: a rule of onnxscript keeps the last node that it has looked at.
    """
    import onnx_ir

    weights = []
    for name, value in model.graph.initializers.items():
        weights.append(value.const_value)
        weights[-1].name, value.const_value = name, None
    model.graph.initializers.clear()
    message = onnx_ir.to_proto(model)
    graph = message.graph.SerializeToString()
    message.ClearField("graph")
    sizes = [onnx_ir.to_proto(weight).ByteSize() for weight in weights]
    heads = [_head(type(message.graph).INITIALIZER_FIELD_NUMBER, size) for size in sizes]
    with path.open("wb") as file:
        file.write(message.SerializeToString())
        file.write(_head(type(message).GRAPH_FIELD_NUMBER, len(graph) + sum(sizes) + sum(map(len, heads))) + graph)
        for head, weight in zip(heads, weights, strict=True):
            file.write(head)
            file.write(onnx_ir.to_proto(weight).SerializeToString())


def _head(field: int, size: int) -> bytes:
    """Encode what protobuf writes before ``size`` bytes of a field: the number of the field, and the size.

    >>> _head(7, 300).hex()
    '3aac02'
    """
    found = bytearray([field << 3 | 2])
    while size > 127:
        found.append(size & 127 | 128)
        size >>= 7
    return bytes([*found, size])


@contextmanager
def _quiet_registry() -> Iterator[None]:
    """Silence the log that torchvision's operators are not registered."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
