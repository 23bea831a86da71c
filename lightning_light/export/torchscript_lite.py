"""Export to TorchScript for the lite interpreter, the ``.ptl`` files of PyTorch's mobile runtime."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.jit._trace import TracerWarning
from torch.utils._pytree import tree_leaves, tree_map
from typing_extensions import override

from lightning_light.errors import TraceError, UnsupportedError
from lightning_light.export.exporter import Exporter
from lightning_light.export.inputs import Positional, is_plain
from lightning_light.export.int8 import describe, quantizer_of
from lightning_light.export.program import FAILURES, flat_tensors
from lightning_light.int8 import Int8Weights, int8_kernels
from lightning_light.isolation import plain_attention
from lightning_light.validation import validated
from lightning_light.warning_filters import ignored_warnings

__all__ = ["Engine", "TorchScriptLite"]

Engine = Literal["qnnpack", "x86"]

_DEPRECATIONS = (r"`torch\.jit\.\w+` is deprecated", r"Lite Interpreter is deprecated")
_TORCH = os.path.dirname(torch.__file__)
_BETWEEN = (str(Path(__file__).parents[1]), torch.overrides.__file__, warnings.__file__)
"""Files whose code stands between the tracer and the line that called an operator."""


@validated
@dataclass(frozen=True)
class TorchScriptLite(Exporter):
    """Export by trace and freeze for the lite interpreter; a quantized network gives an int8 file.

    Freezing makes every weight a constant, drops dropout and folds a batch norm into the convolution or linear layer
    before it. One that follows a transposed convolution, or comes before its convolution, stays; the report counts
    those as ``batch_norms_left``. Python runs once, while tracing: a branch that depends on values keeps the side that
    the example took, and a warning names its line.

    A fake-quantized network (in a Trainer with `QuantizationAwareTraining`, or within
    `fake_quantized`) is traced as it runs on torch's int8 kernels; the report names the layers that have none.

    Args:
        engine: whose int8 kernels: ``qnnpack`` for ARM, ``x86`` for servers; None for those of the recipe. A file is
            for one of them.

    Raises:
        ValueError: there is no such engine.
    """

    suffix: ClassVar[str] = ".ptl"

    engine: Engine | None = None

    @override
    def check(self) -> None:
        saves = "_save_for_lite_interpreter" in vars(getattr(torch.jit, "RecursiveScriptModule", object))
        runs = importlib.util.find_spec("torch.jit.mobile") is not None
        if not (saves and runs and hasattr(torch.jit, "freeze")):
            raise UnsupportedError(
                f"`{self}` with torch {torch.__version__}: expected a release that writes files for the "
                "lite interpreter (up to 2.15), found one that has dropped it. Install `torch<2.16`, or use an "
                "exporter for its successor, ExecuTorch."
            )

    @override
    def check_int8(self, weights: Int8Weights | None) -> None:
        if weights is not None:
            weights.check(self.engine or "qnnpack")  # None is the recipe's, which its weights fit
        elif self.engine is not None:
            raise UnsupportedError(
                f"`MobileExport(..., exporter={self})`: expected a Trainer that quantizes for int8 kernels, found "
                "no callback that does. Add `QuantizationAwareTraining(...)` before the export; for a float "
                "file write `TorchScriptLite()`."
            )

    @override
    def runtime(self) -> str:
        return f"TorchScript lite interpreter of torch {torch.__version__}"

    @override
    def write(self, model: Positional, tensors: tuple[Any, ...], path: Path) -> dict[str, Any]:
        quantizer = quantizer_of(str(self), model.model)
        if quantizer is None:
            self._check_float(type(model.model).__name__)
            frozen, details = _written(self, model, tensors, path)
            left = frozen.inlined_graph.findAllNodes("aten::batch_norm", recurse=True)
            return {**details, "batch_norms_left": len(left)}
        engine = self.engine or ("x86" if quantizer.engine == "x86" else "qnnpack")  # the others' rules are qnnpack's
        with quantizer.quantized_ops(lambda: model(*tensors), engine) as lowered:
            frozen, details = _written(self, model, tensors, path, lowered.packed, {"engine": engine})
        operations = Counter(node.kind() for node in frozen.inlined_graph.nodes())
        quantized = {kind: count for kind, count in operations.items() if kind.startswith("quantized::")}
        return {**details, "engine": engine, **describe(str(self), model, lowered), "int8_operations": quantized}

    @override
    def load(self, path: Path) -> Callable[..., Any]:
        engine = _engine_of(path)
        with quiet_deprecations(), int8_kernels(engine):  # packs the weights for the engine
            network = _runtime()._load_for_lite_interpreter(str(path))

        def run(*tensors: Any) -> Any:
            with int8_kernels(engine):
                return network(*tensors)

        return network if engine is None else run

    def _check_float(self, name: str) -> None:
        if self.engine is not None:
            raise UnsupportedError(
                f"`{self}` on `{name}`: expected a fake-quantized network, found a float one. Train it "
                "with `QuantizationAwareTraining`, and export in the same Trainer or within "
                "`with fake_quantized(module):`; for a float file write `TorchScriptLite()`."
            )


def _engine_of(path: Path) -> str | None:
    """What an int8 file was made for: it overflows in an engine with a smaller range."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith("/extra/engine")]
        return archive.read(names[0]).decode() if names else None


def _written(
    exporter: TorchScriptLite,
    model: Positional,
    tensors: tuple[Any, ...],
    path: Path,
    packed: Sequence[Any] = (),
    notes: Mapping[str, str] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Trace, freeze and save; return the frozen network and details of the file.

    Args:
        exporter: for messages.
        model: as in `Exporter.write`.
        tensors: as in `Exporter.write`.
        path: as in `Exporter.write`.
        packed: weights that are not tensors, held by the kernels of the network.
        notes: written into the file, as ``extra/{name}``.
    """
    with quiet_deprecations(), plain_attention():
        traced, branches = _trace(exporter, model, tensors, packed)
        try:
            frozen = torch.jit.freeze(traced, preserved_attrs=list(_named(packed)))  # constants would be written twice
            _forget_places(frozen.graph)
            # In memory, since torch ends the process where its own writer cannot write, to a full disk for instance.
            content = frozen._save_to_buffer_for_lite_interpreter(_extra_files=dict(notes or {}))
        except RuntimeError as error:  # an `autograd.Function` of the user's: Python that no file can hold
            raise TraceError(_advice(exporter, model, error)) from error
        path.write_bytes(content)
        version = _runtime()._get_model_bytecode_version(str(path))
    _warn_of(exporter, branches, type(model.model).__name__)
    return frozen, {"torch": torch.__version__, "bytecode_version": version, "built_in_values": branches}


def _forget_places(graph: Any) -> None:
    """Remove from every operator the lines of code that called it, which have paths of this machine."""
    nowhere, blocks = graph.create("prim::Constant"), [graph]
    for block in blocks:
        for node in block.nodes():
            node.copyMetadata(nowhere)
            blocks += node.blocks()


def _runtime() -> Any:
    """Import the runtime, which torch does not load by itself; `check` refuses a release without it."""
    return importlib.import_module("torch.jit.mobile")


def quiet_deprecations() -> AbstractContextManager[None]:
    """Silence torch's warnings that TorchScript is deprecated, and no others."""
    return ignored_warnings(*_DEPRECATIONS)  # a DeprecationWarning in some releases, a FutureWarning in others


def _named(packed: Sequence[Any]) -> dict[str, Any]:
    return {f"packed_{place}": weight for place, weight in enumerate(packed)}


class _TracedCall(nn.Module):
    """Hides the model's modules from the tracer, which records operators, and weights as constants.

    It would read every attribute and property of the user's modules; some raise (``trainer``).
    """

    def __init__(self, model: nn.Module, packed: Sequence[Any] = ()) -> None:
        super().__init__()
        vars(self)["held"] = (model,)
        vars(self).update(_named(packed))  # of int8 kernels: objects that the tracer has to find somewhere
        for place, module in enumerate(model.modules()):
            if isinstance(module, torch.jit.ScriptModule):  # the one kind that the tracer has to know
                self.add_module(f"scripted_{place}", module)

    @override
    def forward(self, *tensors: Any) -> Any:
        outputs = vars(self)["held"][0](*tensors)
        return outputs if is_plain(outputs) else tuple(flat_tensors(outputs))


def _trace(
    exporter: TorchScriptLite, model: Positional, tensors: tuple[Any, ...], packed: Sequence[Any]
) -> tuple[Any, list[str]]:
    """Return the trace, and the lines of code whose Python values became constants.

    Code that compares the batch size with one may take another side for one sample than for more. A trace has one side:
    that of two samples where that of one does not run on two, but that of two on one.
    """
    trace = _trace_once(exporter, model, tensors, packed)
    if any(tree_leaves(model.batched)):
        two = tree_map(lambda leaf, batched: torch.cat([leaf, leaf]) if batched else leaf, tensors, model.batched)
        if not _runs(trace, two) and _runs(other := _trace_once(exporter, model, two, packed), tensors):
            return other
    return trace


def _runs(trace: tuple[Any, list[str]], tensors: tuple[Any, ...]) -> bool:
    try:
        trace[0](*tensors)
    except FAILURES:
        return False
    return True


def _trace_once(
    exporter: TorchScriptLite, model: Positional, tensors: tuple[Any, ...], packed: Sequence[Any]
) -> tuple[Any, list[str]]:
    lines: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always", TracerWarning)
        warnings.showwarning = functools.partial(_note_line, lines, warnings.showwarning)
        try:
            traced = torch.jit.trace(_TracedCall(model, packed).eval(), tensors, strict=False, check_trace=False)  # type: ignore[no-untyped-call]
        except (RuntimeError, TypeError, ValueError) as error:
            raise TraceError(_advice(exporter, model, error)) from error
    return traced, list(dict.fromkeys(lines))


def _note_line(lines: list[str], show: Callable[..., None], message: Any, category: Any, *rest: Any) -> None:
    """Note the line that called the operator of which the tracer warns; show other warnings."""
    if not issubclass(category, TracerWarning):
        show(message, category, *rest)
        return
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        frame = frame.f_back
    if not frame.f_code.co_filename.startswith(_TORCH):  # torch's own checks hold for every input
        lines.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")


def _warn_of(exporter: TorchScriptLite, branches: list[str], name: str) -> None:
    if branches:
        warnings.warn(
            f"`{exporter}` on `{name}`: Python values that were taken from tensors at {', '.join(branches)} are "
            "part of the file as they were for the example. Checks that hold for every input are fine; a branch or a "
            "size that depends on the input is not: write it with tensor operations (`torch.where`).",
            stacklevel=2,
        )


def _advice(exporter: TorchScriptLite, model: Positional, error: Exception) -> str:
    name = type(model.model).__name__
    if found := re.search(r"Could not export Python function call '(\w+)'", str(error)):
        return (
            f"`{exporter}` on `{name}`: expected torch operations, found the Python function `{found[1]}`, an "
            "`autograd.Function`. Call what it computes directly while `torch.jit.is_tracing()`, or use `ONNX()` or "
            "`ExecuTorch()`, which look into it."
        )
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "infer type" in str(error) or "can be output from traced" in str(error):
        return (
            f"`{exporter}` on `{name}`: expected inputs and outputs that are tensors, tuples of them, or lists "
            f"and dicts whose values are all of one kind; found others. {lines[-1].removeprefix(':')} Return a tuple, "
            "a flat dict of tensors, or export a small module that calls yours and does so."
        )
    return (
        f"`{exporter}` on `{name}`: expected a forward that can be traced with inputs "
        f"{', '.join(model.names)}; found {type(error).__name__}: {lines[0]}. Check that `model.eval()(...)` runs on "
        "one sample on the CPU, and that `forward` uses torch operations only."
    )
