"""Trace dependencies: follow the channels of a model through one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from typing_extensions import override

from lightning_light.dependency.context import Leaf, TraceContext
from lightning_light.dependency.labels import LabelUnion
from lightning_light.dependency.placeholders import PRODUCTS, ValueNeededError
from lightning_light.dependency.recording import Recorder, wrap_forwards
from lightning_light.dependency.rules import RULES, elementwise, operands, outputs_of, unknown
from lightning_light.errors import TraceError
from lightning_light.host.modules import is_step_call
from lightning_light.isolation import FORWARD_ERRORS, isolated, unfused_kernels
from lightning_light.module_stack import ModuleCall, ModuleStack
from lightning_light.nested import tensors_in

__all__ = ["UNUSED", "Tracer", "running", "trace"]

UNUSED = "is not used by the forward pass"


_NAMES: dict[Any, str] = {}

Known: TypeAlias = "Mapping[tuple[str, int], Tensor]"


@dataclass(eq=False)
class Tracer(TraceContext, TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own signature
    """Follow labels through ATen operations by their rules.

    Attributes:
        recorder: of the torch functions that the user's code calls.
        skip_products: do not compute matrix products and convolutions.
    """

    recorder: Recorder = field(init=False)
    skip_products: bool = False
    _used: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        TorchDispatchMode.__init__(self)  # type: ignore[no-untyped-call]
        self.modules = _Modules(self)
        self.recorder = Recorder(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tracer:
        """Return itself: a module that the traced code copies has hooks that belong to this trace."""
        return self

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, then its rule."""
        with torch._C.DisableTorchFunction():  # what runs here is not the user's code
            return self._dispatched(function, args, kwargs or {})

    def _dispatched(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        first = args[0] if args and isinstance(args[0], Tensor) else None
        self.shape_before = torch.Size() if first is None else first.shape
        before = None if first is None else self._labels.get(first)
        read = operands(args, kwargs)
        self._used.update(self._parameters[x][0] for x in read if x in self._parameters)
        for label in (label for x in read for label in self._indices.get(x, ())):
            self.union.protect(label, "is selected by a computed index")
        name = _operation_name(function)
        out = self._run(name, function, args, kwargs, read)
        self._function = function
        found = RULES.get(name) or (elementwise if torch.Tag.pointwise in function.tags else unknown)
        if first is not None and before is not None and first is out:
            self._labels[first] = before
        found(self, name, args, kwargs, out)
        self.history.append((name, [self._labels.get(x, []) for x in outputs_of(out)]))
        return out

    def _run(
        self, name: str, function: Any, args: Sequence[Any], kwargs: dict[str, Any], read: Sequence[Tensor]
    ) -> Any:
        """Run the operation; of a product only the shape where nothing needs its values."""
        self.placeholders.check_read(name, read)
        out = (
            self.placeholders.product(name, function, args, kwargs) if self.skip_products and name in PRODUCTS else None
        )
        out = function(*args, **kwargs) if out is None else out
        if self.placeholders.among(read):
            self.placeholders.add(outputs_of(out))
        return out

    def watch(self, model: nn.Module, known: Known | None = None) -> None:
        """Label every dimension of every parameter and buffer of ``model``, with new labels or those in ``known``."""
        named = [*model.named_parameters(), *model.named_buffers()]
        known = self._new_labels(named) if known is None else known
        for name, tensor in named:
            own = []
            for dim, size in enumerate(tensor.shape if tensor.is_floating_point() else ()):
                if size > 1:
                    labels = known[name, dim]
                    self.leaves.append(Leaf(name, dim, labels))
                    own.append(labels.reshape([size if d == dim else 1 for d in range(tensor.dim())]))
            self._labels[tensor] = own
            self.name_parameter(tensor, name)
        self.modules.watch(model)

    def _new_labels(self, named: Sequence[tuple[str, Tensor]]) -> Known:
        """Return a new label for each position of every dimension."""
        tensors = [(name, tensor) for name, tensor in named if tensor.is_floating_point()]
        sizes = {(name, dim): size for name, x in tensors for dim, size in enumerate(x.shape) if size > 1}
        counts = list(sizes.values())
        labels = self.union.new(sum(counts)).split(counts)  # type: ignore[no-untyped-call]  # torch's own signature
        return dict(zip(sizes, labels, strict=True))

    def after(self, positions: Mapping[str, Mapping[int, Tensor]]) -> tuple[LabelUnion, Known]:
        """Return the labels to start a second trace with, when only ``positions`` of the tensors are left."""
        known = {}
        for leaf in self.leaves:
            labels, kept = self.union.roots(leaf.labels), positions.get(leaf.tensor, {}).get(leaf.dim)
            known[leaf.tensor, leaf.dim] = labels if kept is None else labels[kept]
        return LabelUnion(torch.arange(self.union.parent.numel())), known

    def protect_unused(self) -> None:
        """Protect the parameters and buffers that no operation has read."""
        for leaf in self.leaves:
            if leaf.tensor not in self._used:
                self.union.protect(leaf.labels, UNUSED)


def trace(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    heads: str = "dim",
    known: Known | None = None,
    union: LabelUnion | None = None,
) -> Tracer:
    """Follow every channel of ``model`` through one forward pass on ``args`` and ``kwargs``.

    The model is left as it was: see `isolated`. Matrix products and convolutions are not computed in a first trace,
    unless the code reads values that depend on them.

    Args:
        model: the module.
        args: positional arguments of one call.
        kwargs: keyword arguments of that call.
        heads: see `Tracer`.
        known: labels to start from, of an earlier trace.
        union: the union-find that they belong to.

    Raises:
        TraceError: the forward pass fails.
    """
    for skip in (True, False) if known is None else (False,):
        tracer = Tracer(heads=heads, union=union or LabelUnion(), skip_products=skip)
        try:
            outputs = _run_model(tracer, model, args, kwargs or {}, known)
            break
        except ValueNeededError:
            continue
    tracer.output_shapes = [tuple(tensor.shape) for tensor in outputs]
    for tensor in outputs:
        for label in tracer.labels_of(tensor):
            tracer.union.protect(label, "produces the model output")
    tracer.history.append(("output", [tracer.labels_of(tensor) for tensor in outputs]))
    if known is None:
        _protect_projections(model, tracer)
        tracer.protect_unused()
    return tracer


def _run_model(
    tracer: Tracer, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], known: Known | None
) -> list[Tensor]:
    """Run ``model`` under ``tracer``, and return the tensors in its output."""
    with running(model):
        tracer.watch(model, known)
        wrap_forwards(model, tracer.recorder.run_forward)
        try:
            with tracer, tracer.recorder:
                out = model(*args, **kwargs)
        except FORWARD_ERRORS as error:
            raise TraceError(_failure(model, error)) from error
        finally:
            tracer.modules.remove()
    return list(tensors_in(out, objects=True))


def _failure(model: nn.Module, error: Exception) -> str:
    found = f"{type(error).__name__}: {error}"
    if is_step_call(model):
        return (
            f"`{type(model).__name__}` does not run in a trace of `training_step` on the first batch: {found}. "
            "Expected one step without logging, gradients and optimizers."
        )
    return (
        f"`{type(model).__name__}` does not run on the example input: {found}. Expected one forward pass in eval mode. "
        "Give an input that `forward` accepts: `self.example_input_array = ...` in the module."
    )


def _operation_name(function: Any) -> str:
    if function not in _NAMES:
        _NAMES[function] = function._schema.name.split("::")[1]
    return _NAMES[function]


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Isolate ``model`` for a trace that includes the user's forward hooks and every matrix product."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    with isolated(model, hooks=True), unfused_kernels(convolutions=not recurrent):
        yield


class _Modules(ModuleStack):
    """Keep the labels along the last dimension of the input, for each running call."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    @override
    def entered(self, call: ModuleCall) -> None:
        source = next((arg for arg in call.args if isinstance(arg, Tensor) and arg.dim()), None)
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            width = None if source is None else self._tracer.along(source, source.dim() - 1)
        self._tracer._widths.append(width)

    @override
    def left(self, call: ModuleCall, output: Any) -> None:
        self._tracer._widths.pop()


def _protect_projections(model: nn.Module, tracer: Tracer) -> None:
    """Protect the inner width of an LSTM with projections: torch requires it to be larger than the outer one."""
    projecting = {name for name, m in model.named_modules() if isinstance(m, nn.RNNBase) and m.proj_size}
    for leaf in tracer.leaves:
        path, _, name = leaf.tensor.rpartition(".")
        if path in projecting and leaf.dim == 0 and name.startswith("weight_ih"):
            tracer.union.protect(leaf.labels, "is projected inside an LSTM, which has to stay wider than its output")
