"""Export to ExecuTorch, PyTorch's runtime for phones and microcontrollers."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from typing_extensions import override

from lightning_light.errors import TraceError, UnsupportedError
from lightning_light.export.exporter import Exporter
from lightning_light.export.extras import check_pair, need, version_of
from lightning_light.export.inputs import Positional
from lightning_light.export.int8 import traced_int8
from lightning_light.export.program import FAILURES, Program, advice, flat_tensors, quiet_torch
from lightning_light.int8 import QDQConstraints
from lightning_light.validation import PositiveInt, validated
from lightning_light.warning_filters import ignored_warnings

__all__ = ["ExecuTorch"]

_PAIRS = (("1.4", "2.13"), ("1.5", "2.15"))  # releases of ExecuTorch, and of torch that they are built with
_INT8 = QDQConstraints("xnnpack", signed=True)
_DELEGATE = "executorch_call_delegate"
_PARTITIONER = "executorch.backends.xnnpack.partition.xnnpack_partitioner"


@validated
@dataclass(frozen=True)
class ExecuTorch(Exporter):
    """Export by `torch.export` and ExecuTorch's lowering; the file is run by ExecuTorch's Python bindings.

    With ``partitioner='xnnpack'`` XNNPACK runs the operators it supports (whole convolutional networks, batch norms
    folded), and portable kernels the rest: the report counts both. Memory is planned when the file is written, for the
    largest batch: export for ``batch='one'`` where a device runs one sample at a time. Needs
    ``pip install lightning-light[executorch]``.

    Args:
        partitioner: ``xnnpack``, or None for portable kernels only, which are slow and run on any processor.
        max_batch: largest batch of files that are exported for ``batch='any'``.

    Note:
        ExecuTorch has one thread pool per process. Loading a file sets its size to torch's number of threads.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
    """

    suffix: ClassVar[str] = ".pte"

    partitioner: Literal["xnnpack"] | None = "xnnpack"
    max_batch: PositiveInt = 8

    @property
    @override
    def largest_batch(self) -> int | None:
        return self.max_batch

    @override
    def check(self) -> None:
        partitioner = [_PARTITIONER] if self.partitioner else []  # which needs torchao
        need(str(self), "executorch", "executorch.exir", "executorch.extension.pybindings.portable_lib", *partitioner)
        check_pair(str(self), "executorch", version_of("executorch"), torch.__version__, _PAIRS)

    @override
    def runtime(self) -> str:
        kernels = "XNNPACK" if self.partitioner else "portable kernels"
        return f"ExecuTorch {version_of('executorch')}, {kernels}"

    @override
    def write(self, model: Positional, tensors: tuple[Any, ...], path: Path) -> dict[str, Any]:
        _make_contiguous(model)
        tensors = tree_map(lambda leaf: _contiguous(leaf) if isinstance(leaf, Tensor) else leaf, tensors)
        program, int8 = traced_int8(str(self), model, tensors, _INT8, largest=self.max_batch)
        with _Refusing(str(self), model):
            delegates, left, lowered = self._lowered(program, open_batch=any(tree_leaves(model.batched)))
        (plan,) = lowered.executorch_program.execution_plan
        self._check_planned(plan)
        path.write_bytes(lowered.buffer)
        return {
            "torch": torch.__version__,
            "executorch": version_of("executorch"),
            "inputs": program.inputs,
            "outputs": program.outputs,
            "delegates": delegates,
            "portable_operators": left,
            "planned_bytes": sum(plan.non_const_buffer_sizes),
            **int8,
        }

    @override
    def load(self, path: Path) -> Callable[..., Any]:
        with _quiet_bindings():
            return _Method(path)

    def _check_planned(self, plan: Any) -> None:
        """Check the planned batch: its passes may fix the example's size, or 15, a limit of a convolution kernel."""
        inputs = [plan.values[place].val for place in plan.inputs]
        planned = min((value.sizes[0] for value in inputs if value.shape_dynamism.value), default=self.max_batch)
        if planned < self.max_batch:
            raise UnsupportedError(
                f"`{self}`: expected memory for batches of {self.max_batch}, found that ExecuTorch plans it for "
                f"{planned} of this network, because a size, in `forward` or in the runtime, became a constant. Write "
                f"`ExecuTorch(max_batch={planned})`, with which `load_exported` runs larger batches in parts, or "
                "export for one sample at a time with `batch='one'`."
            )

    def _lowered(self, program: Program, open_batch: bool) -> tuple[int, list[str], Any]:
        """Return the number of delegated parts, the operators that are not delegated, and the lowered program."""
        _portable_kernels_of_int8()
        with _quiet_bindings(), quiet_torch():
            from executorch.exir import to_edge_transform_and_lower

            _copy_attention_before_views(program.graph.graph)
            graph = _splits_as_slices(program.graph)
            _write_strides(graph.graph)
            partitioners = [_xnnpack(open_batch)] if self.partitioner else []
            edge = to_edge_transform_and_lower(graph, partitioner=partitioners)
            called = _called(edge.exported_program().graph_module.graph)
            left = sorted(set(called) - {_DELEGATE, "getitem"})
            return called.count(_DELEGATE), left, edge.to_executorch()


def _xnnpack(open_batch: bool) -> Any:
    """The partitioner of XNNPACK, which takes means of int8 as such only where the batch is one size.

    Their kernel has scratch memory of four bytes for every number that it gives. It is planned for the batch of the
    first call, and when a larger one follows it is written past its end: alone among the kernels that have such memory,
    this one does not ask for more. Computed in float, a mean needs none.
    """
    from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    partitioner = XnnpackPartitioner()
    if open_batch:
        partitioner.target_partitioner_configs["mean.dim"].set_enabled_precision_types([ConfigPrecisionType.FP32])
    return partitioner


class _Refusing:
    """Turns the exceptions of ExecuTorch's passes, bare ``Exception`` included, into a `TraceError`.

    Raises:
        TraceError: on the way out.
    """

    def __init__(self, call: str, model: Positional) -> None:
        self._call, self._model = call, model

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and (kind is Exception or isinstance(error, (*FAILURES, _unknown_operation()))):
            cause = error.__cause__ if isinstance(error.__cause__, Exception) and kind is Exception else error
            raise TraceError(advice(self._call, self._model, cause)) from error


def _make_contiguous(model: nn.Module) -> None:
    """Make all tensors contiguous: ExecuTorch's passes do not support channels-last strides."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = _contiguous(tensor.data)


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _unknown_operation() -> type[Exception]:
    """Return the exception of the lowering for an unknown operator, which has no public base class."""
    from torch._export.verifier import SpecViolationError

    return SpecViolationError


def _write_strides(graph: torch.fx.Graph) -> None:
    """Add the default stride of pools, the kernel's size, which XNNPACK's partitioner requires."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.max_pool2d.default):
        if len(node.args) == 2:
            node.args = (*node.args, node.args[1])


def _copy_attention_before_views(graph: torch.fx.Graph) -> None:
    """Make attention contiguous where the network calls ``view``: its decomposition orders tokens before samples."""
    aten = torch.ops.aten
    for view in graph.find_nodes(op="call_function", target=aten.view.default):
        given = source = view.args[0]
        while source.target in (aten.transpose.int, aten.permute.default, aten.reshape.default, aten.alias.default):
            source = source.args[0]
        if source.target is aten.scaled_dot_product_attention.default:
            with graph.inserting_before(view):
                copy = graph.call_function(aten.clone.default, (given,), {"memory_format": torch.contiguous_format})
            copy.meta = dict(given.meta)
            view.replace_input_with(given, copy)


def _splits_as_slices(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Write the parts of splits as slices: ExecuTorch makes the batch size of a tensor that is split a constant."""
    aten, default = torch.ops.aten, torch.export.default_decompositions()
    gates = (aten.gru.input, aten.lstm.input, aten.gru_cell.default, aten.lstm_cell.default)
    table = {
        **{operator: default[operator] for operator in gates},
        **dict.fromkeys((aten.split.Tensor, aten.unsafe_split.Tensor), _split),
        **dict.fromkeys((aten.split_with_sizes.default, aten.unsafe_split_with_sizes.default), _split_with_sizes),
    }
    composed = (aten.chunk.default, aten.unsafe_chunk.default, aten.split.sizes)  # they are decomposed in any case
    splits = any(program.graph.find_nodes(op="call_function", target=operator) for operator in (*table, *composed))
    return program.run_decompositions(table) if splits else program


def _split(tensor: Tensor, size: int, dim: int = 0) -> list[Tensor]:
    whole = tensor.shape[dim]
    return _split_with_sizes(tensor, [min(size, whole - start) for start in range(0, whole, size)], dim)


def _split_with_sizes(tensor: Tensor, sizes: list[int], dim: int = 0) -> list[Tensor]:
    bounds = pairwise(accumulate(sizes, initial=0))
    return [torch.ops.aten.slice.Tensor(tensor, dim, start, end) for start, end in bounds]


def _called(graph: torch.fx.Graph) -> list[str]:
    return [getattr(node.target, "__name__", str(node.target)) for node in graph.nodes if node.op == "call_function"]


class _Method:
    """A loaded file."""

    _loaded: ClassVar[weakref.WeakSet[_Method]] = weakref.WeakSet()

    def __init__(self, path: Path) -> None:
        from executorch.runtime import Runtime

        _portable_kernels_of_int8()
        _set_threads(torch.get_num_threads(), bool(self._loaded))
        self._program = Runtime.get().load_program(path)
        try:
            self._method = self._program.load_method("forward")
        except RuntimeError as error:
            raise TraceError(
                f"`ExecuTorch`: expected a file that its runtime loads, found that it does not: {error}. The "
                "standard error names the operator it cannot prepare: replace it, or use another runtime."
            ) from error
        self._loaded.add(self)

    def __call__(self, *tensors: Any) -> list[Tensor]:
        return list(self._method.execute([tensor.detach().contiguous() for tensor in flat_tensors(tensors)]))


def _portable_kernels_of_int8() -> None:
    """Register quantize and dequantize, for lowering and for running: XNNPACK does not take them everywhere."""
    importlib.import_module("executorch.kernels.quantized")


def _set_threads(count: int, in_use: bool) -> None:
    from executorch.extension.pybindings import portable_lib

    found = portable_lib._threadpool_get_thread_count()
    if found == count:
        return
    if in_use:  # XNNPACK holds on to the pool that it was loaded with
        raise UnsupportedError(
            f"A file of `ExecuTorch()` with {count} threads: expected no other file to be loaded in this process, or "
            f"one with as many threads, found one with {found}. Delete it first (`del`), or use {found}."
        )
    portable_lib._unsafe_reset_threadpool(count)


def _quiet_bindings() -> AbstractContextManager[None]:
    """Silence ExecuTorch's warnings about its experimental interface and its own deprecated calls."""
    return ignored_warnings(
        "This API is experimental", r"\w+ is deprecated. Use files\(\) instead", r"`torch\.jit\.\w+` is deprecated"
    )
