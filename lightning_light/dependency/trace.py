"""Run a model once and watch where every channel goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from lightning_light.dependency.context import Tie, TraceContext
from lightning_light.dependency.labels import LabelUnion
from lightning_light.dependency.rules import RULES, elementwise, unknown
from lightning_light.errors import TraceError
from lightning_light.measure.isolation import uncompiled, unfused_kernels

__all__ = ["FORWARD_ERRORS", "Leaf", "Tracer", "leaf_tensors", "quiet", "trace"]

FORWARD_ERRORS = (
    RuntimeError,  # also NotImplementedError
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
)
"""What a forward pass may raise on an input or a shape that it was not written for."""

Known: TypeAlias = "Mapping[tuple[str, int], Tensor]"


@dataclass(frozen=True)
class Leaf:
    """One dimension of one parameter or buffer, and the label of each of its positions."""

    tensor: str
    dim: int
    labels: Tensor


@dataclass(eq=False)
class Tracer(TraceContext, TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own signature
    """Follows labels through ATen operations, and lets their rules keep the account.

    Attributes:
        leaves: the dimensions that were labelled.
        output_shapes: of the network.
    """

    leaves: list[Leaf] = field(default_factory=list)
    output_shapes: list[tuple[int, ...]] = field(default_factory=list)
    _names: MutableMapping[Tensor, str] = field(default_factory=WeakIdKeyDictionary)
    _used: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        TorchDispatchMode.__init__(self)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, then its rule."""
        kwargs = kwargs or {}
        self.shape_before = args[0].shape if args and isinstance(args[0], Tensor) else torch.Size()
        before = self._marks.get(args[0]) if args and isinstance(args[0], Tensor) else None
        read = leaf_tensors([args, kwargs])
        self._used.update(self._names[x] for x in read if x in self._names)
        for mark in (mark for x in read for mark in self._counting.get(x, ())):
            self.book.protect(mark, "is chosen by its number, which other operations use")
        out = function(*args, **kwargs)
        self._function = function
        name = function._schema.name.split("::")[1]
        found = RULES.get(name) or (elementwise if torch.Tag.pointwise in function.tags else unknown)
        if before is not None and args[0] is out:
            self._marks[out] = before
        found(self, name, args, kwargs, out)
        self.history.append((name, [self._marks.get(x, []) for x in leaf_tensors(out)]))
        return out

    def watch(self, model: nn.Module, known: Known | None = None) -> None:
        """Label every dimension of every parameter and buffer of ``model``, anew or as ``known``."""
        named = [*model.named_parameters(), *model.named_buffers()]
        for name, tensor in named:
            marks = []
            for dim, size in enumerate(tensor.shape if tensor.is_floating_point() else ()):
                if size > 1:
                    labels = self.book.fresh(size) if known is None else known[name, dim]
                    self.leaves.append(Leaf(name, dim, labels))
                    marks.append(labels.reshape([size if d == dim else 1 for d in range(tensor.dim())]))
            self._marks[tensor] = marks
            self._names[tensor] = name

    def enter(self, name: str, module: nn.Module, args: Sequence[Any]) -> None:
        """A module's forward begins."""
        source = next((arg for arg in args if isinstance(arg, Tensor) and arg.dim()), None)
        with _disable_current_modes():
            width = None if source is None else self.along(source, source.dim() - 1)
        self._stack.append((name, module, width))

    def leave(self) -> None:
        """A module's forward ends."""
        self._stack.pop()

    def after(self, positions: Mapping[str, Mapping[int, Tensor]]) -> tuple[LabelUnion, Known]:
        """What to start a second trace with, when only ``positions`` of the tensors are left."""
        known = {}
        for leaf in self.leaves:
            labels, kept = self.book.roots(leaf.labels), positions.get(leaf.tensor, {}).get(leaf.dim)
            known[leaf.tensor, leaf.dim] = labels if kept is None else labels[kept]
        return LabelUnion(torch.arange(self.book.parent.numel())), known

    def protect_unused(self) -> None:
        """What no operation reads belongs to no layer that runs here."""
        for leaf in self.leaves:
            if leaf.tensor not in self._used:
                self.book.protect(leaf.labels, "is not used by the forward pass")


def trace(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    heads: str = "dim",
    known: Known | None = None,
    book: LabelUnion | None = None,
) -> Tracer:
    """Follow every channel of ``model`` through one forward pass on ``args`` and ``kwargs``.

    Everything is as before afterwards: modes, buffers, random state, gradients.

    Args:
        model: the module.
        args: positional arguments of one call.
        kwargs: keyword arguments of that call.
        heads: see `Tracer`.
        known: labels to start from, where a trace before has given them.
        book: to keep them in.

    Raises:
        TraceError: the forward pass fails.
    """
    tracer = Tracer(heads=heads, book=book or LabelUnion())
    tracer.watch(model, known)
    with quiet(model), _module_names(model, tracer), tracer:
        try:
            out = model(*args, **(kwargs or {}))
        except FORWARD_ERRORS as error:
            raise TraceError(
                f"`{type(model).__name__}` does not run on the example input: {type(error).__name__}: {error}. "
                "Expected one forward pass in eval mode. Give an input that `forward` accepts: "
                "`self.example_input_array = ...` in the module."
            ) from error
    tracer.output_shapes = [tuple(tensor.shape) for tensor in leaf_tensors(out)]
    for tensor in leaf_tensors(out):
        for mark in tracer.marks(tensor):
            tracer.book.protect(mark, "makes the network's output")
    tracer.history.append(("output", [tracer.marks(tensor) for tensor in leaf_tensors(out)]))
    if known is None:
        _tie_attention(model, tracer)
        _keep_projections(model, tracer)
        tracer.protect_unused()
    return tracer


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """A forward pass as the user wrote it, hooks and all, that leaves no trace: modes, buffers, random state."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    kernels = unfused_kernels(convolutions=not recurrent)
    with torch.random.fork_rng(devices), torch.no_grad(), uncompiled(model), kernels:
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for buffer, value in buffers:
                if buffer.shape == value.shape and not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextmanager
def _module_names(model: nn.Module, tracer: Tracer) -> Iterator[None]:
    """Tell ``tracer`` which module runs."""

    def before(name: str) -> Callable[..., None]:
        return lambda module, args: tracer.enter(name, module, args)

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(before(name)))
        handles.append(module.register_forward_hook(lambda *_: tracer.leave(), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def leaf_tensors(value: Any) -> list[Tensor]:
    """Every tensor in nested lists, tuples, mappings and plain objects, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in leaf_tensors(item)]
    if hasattr(value, "__dict__"):
        return [tensor for item in vars(value).values() for tensor in leaf_tensors(item)]
    return []


def _tie_attention(model: nn.Module, tracer: Tracer) -> None:
    """``nn.MultiheadAttention`` has one width inside and outside: a channel leaves the stream and the heads at once."""
    labels = {(leaf.tensor, leaf.dim): leaf.labels for leaf in tracer.leaves}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            prefix = f"{name}." if name else ""
            stream = labels[f"{prefix}out_proj.weight", 0]
            tracer.ties.append(Tie(name, "embed_dim", stream))
            for weight in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
                rows = labels.get((f"{prefix}{weight}", 0))
                if rows is not None:
                    tracer.book.merge(rows.view(-1, stream.numel()), stream)
            tracer.book.merge(labels[f"{prefix}out_proj.weight", 1], stream)
            queries = labels.get((f"{prefix}in_proj_weight", 1), labels.get((f"{prefix}q_proj_weight", 1)))
            if queries is not None:
                tracer.book.merge(queries, stream)


def _keep_projections(model: nn.Module, tracer: Tracer) -> None:
    """An LSTM with projections must be wider inside than outside: torch tells the two apart by their sizes."""
    projecting = {name for name, m in model.named_modules() if isinstance(m, nn.RNNBase) and m.proj_size}
    for leaf in tracer.leaves:
        path, _, name = leaf.tensor.rpartition(".")
        if path in projecting and leaf.dim == 0 and name.startswith("weight_ih"):
            tracer.book.protect(leaf.labels, "is projected inside its LSTM, which has to stay wider than its outputs")
