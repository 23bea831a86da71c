"""Record the torch functions that a traced pass calls, and derive what each has to give without some channels.

Functions are recorded as the user's code calls them, before torch decomposes them into operations. At this level the
sequence does not depend on strides, so it is the same in every pass over the same code.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lightning_light.dependency.context import TraceContext
from lightning_light.dependency.labels import varying

__all__ = [
    "METADATA",
    "SET_DATA",
    "Call",
    "Expectation",
    "ModuleResult",
    "Recorded",
    "Recorder",
    "Recording",
    "function_name",
    "rebuilt",
    "seed_for",
    "tensors_of",
    "wrap_forwards",
]

_SIZES = ("shape", "ndim", "itemsize", "nbytes")
_KINDS = ("dtype", "device", "layout", "is_cuda", "is_mps", "is_meta", "is_sparse", "is_nested", "is_quantized")
_GRADIENT = ("requires_grad", "grad", "grad_fn", "is_leaf")
_SIZE_METHODS = ("size", "dim", "ndimension", "numel", "nelement", "stride", "__len__", "element_size")
_KIND_METHODS = ("is_floating_point", "is_complex", "is_contiguous", "get_device", "storage_offset", "data_ptr")
METADATA = frozenset(
    [
        *(getattr(Tensor, name).__get__ for name in (*_SIZES, *_KINDS, *_GRADIENT)),
        *(getattr(Tensor, name) for name in (*_SIZE_METHODS, *_KIND_METHODS, "__hash__")),
        torch.is_floating_point,
        torch.is_complex,
        torch.is_tensor,
        torch.numel,
    ]
)
"""Functions that read no more of a tensor than its shape and kind. They are not recorded."""

_DRAWS = {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "multinomial"}
_FILLS = {"bernoulli", "bernoulli_", "normal_", "uniform_", "exponential_", "random_"}
_DROPOUTS = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"}
_RANDOM = _DRAWS | _FILLS | _DROPOUTS
_NAMES: dict[Any, str] = {}
_GET_DATA, SET_DATA = Tensor.data.__get__, Tensor.data.__set__  # type: ignore[attr-defined]  # a descriptor
_ATTENTION = inspect.signature(F.multi_head_attention_forward)
_TENSOR = object()
"""Stands for a tensor in the structure of a recorded result."""


Structure: TypeAlias = "tuple[TreeSpec, list[Any]]"
_PLAIN = (bool, int, float, str, type(None))


def structure_of(value: Any) -> tuple[list[Tensor], Structure]:
    """Return the tensors in a result, and its structure with `_TENSOR` in their places, for `rebuilt`."""
    leaves, spec = tree_flatten(value)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return tensors, (spec, [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves])


def rebuilt(structure: Structure, tensors: Sequence[Tensor]) -> Any:
    """Return a result of ``structure`` with ``tensors`` in it."""
    spec, leaves = structure
    feed = iter(tensors)
    return tree_unflatten([next(feed) if leaf is _TENSOR else leaf for leaf in leaves], spec)


def wrap_forwards(model: nn.Module, run: Callable[[tuple[str, int], Callable[[], Any]], Any]) -> None:
    """Run every ``forward`` through ``run``, which gets the module's name and how often it has run.

    For use inside `isolated`, which restores the modules.
    """
    numbers: Counter[str] = Counter()

    def wrapped(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward, updated=())
        def call(*args: Any, **kwargs: Any) -> Any:
            numbers[name] += 1
            return run((name, numbers[name]), lambda: forward(*args, **kwargs))

        return call

    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            vars(module)["forward"] = wrapped(name, module.forward)


def function_name(function: Any) -> str:
    """Return the name of a torch function without underscores: ``add`` for ``Tensor.__add__``."""
    if function not in _NAMES:
        name = getattr(function, "__name__", str(function))
        name = str(resolve_name(function) or function) if name == "__get__" else name
        plain = name.removeprefix("__").removesuffix("__")
        _NAMES[function] = {"truediv": "div", "rmul": "mul", "radd": "add", "rsub": "sub"}.get(plain, plain)
    return _NAMES[function]


def seed_for(function: Any, position: int) -> None:
    """Seed torch before a random function, by its position in the pass: other shapes draw the same values elsewhere."""
    if function_name(function) in _RANDOM:
        torch.default_generator.manual_seed(position)  # `torch.manual_seed` formats the stack for every other device
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch's own signature
            torch.cuda.manual_seed_all(position)


@dataclass(frozen=True, eq=False)
class Recorded:
    """A tensor that a recorded call read or returned.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor.
        device: of the tensor.
        labels: of its channels, see `TraceContext`.
        alias: for a result that is one of the call's arguments, the number of that argument among the tensors read.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    labels: tuple[Tensor, ...]
    alias: int | None = None


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a torch function.

    Attributes:
        function: that was called.
        name: see `function_name`.
        inputs: the tensors that it read.
        outputs: the tensors that it returned.
        operations: the range of `TraceContext.history` that it ran.
        structure: of the result, see `structure_of`.
        module: name of the module whose code calls it.
    """

    function: Any
    name: str
    inputs: tuple[Recorded, ...]
    outputs: tuple[Recorded, ...]
    operations: slice
    structure: Structure
    module: str


@dataclass(frozen=True, eq=False)
class ModuleResult:
    """What one run of a module's ``forward`` returned.

    Attributes:
        start: number of torch functions called before it.
        end: number of torch functions called at its end.
        outputs: the tensors that it returned.
        structure: of the result, see `Call`; None if it has parts that cannot be rebuilt.
    """

    start: int
    end: int
    outputs: tuple[Recorded, ...]
    structure: Structure | None


class Recorder(TorchFunctionMode):
    """Record the calls of the pass that ``trace`` follows, and the results of modules.

    Attributes:
        calls: the torch functions that were called.
        results: (module name, how often it has run) -> its result.
    """

    def __init__(self, trace: TraceContext) -> None:
        super().__init__()
        self.trace = trace
        self.calls: list[Call] = []
        self.results: dict[tuple[str, int], ModuleResult] = {}

    def run_forward(self, key: tuple[str, int], forward: Callable[[], Any]) -> Any:
        """Run the ``forward`` of a module, and record its result."""
        start, out = len(self.calls), forward()
        leaves, structure = structure_of(out)
        plain = all(leaf is _TENSOR or isinstance(leaf, _PLAIN) for leaf in structure[1])
        outputs = tuple(self._recorded(leaf) for leaf in leaves)
        self.results[key] = ModuleResult(start, len(self.calls), outputs, structure if plain else None)
        return out

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, and record it if tensors or changed tensors come of it."""
        kwargs = kwargs or {}
        if function in METADATA:
            return function(*args, **kwargs)
        name, start = function_name(function), len(self.trace.history)
        inputs = tensors_of((args, kwargs))
        self.trace.placeholders.check_read(name, inputs)
        seed_for(function, len(self.calls))
        before = tuple(self._recorded(tensor) for tensor in inputs)
        out = function(*args, **kwargs)
        if function == _GET_DATA:  # no operation, so that no rule sees it
            self.trace.share_labels(args[0], out)
        elif function == SET_DATA:
            with _disable_current_modes():
                self.trace.couple_labels(*args)
        elif function == F.multi_head_attention_forward:
            with _disable_current_modes():
                self.trace.couple_attention(_ATTENTION.bind(*args, **kwargs).arguments)
        tensors, structure = structure_of(out)
        outputs = tuple(self._recorded(tensor, inputs) for tensor in tensors)
        if outputs or name == "setitem" or function == SET_DATA:
            operations = slice(start, len(self.trace.history))
            running = self.trace.modules.current
            module = "" if running is None else running.name
            self.calls.append(Call(function, name, before, outputs, operations, structure, module))
        return out

    def _recorded(self, tensor: Tensor, inputs: Sequence[Tensor] = ()) -> Recorded:
        alias = next((number for number, other in enumerate(inputs) if other is tensor), None)
        labels = tuple(self.trace.stored_labels(tensor))
        return Recorded(tuple(tensor.shape), tensor.dtype, tensor.device, labels, alias)


def tensors_of(value: Any) -> list[Tensor]:
    """List the tensors in nested lists, tuples and dicts, in order."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in items for tensor in tensors_of(item)]


class Recording:
    """The calls of a traced pass, with the labels as they are coupled now."""

    def __init__(self, recorder: Recorder) -> None:
        self.trace = trace = recorder.trace
        self.calls, self.results = recorder.calls, recorder.results
        self._spans: dict[int, tuple[int, int]] = {}
        flat: list[Tensor] = [torch.empty(0, dtype=torch.long)]
        end = 0
        for label in self._labels():
            if id(label) not in self._spans:
                self._spans[id(label)] = (end, end + label.numel())
                end += label.numel()
                flat.append(label.reshape(-1))
        self.roots = trace.union.roots(torch.cat(flat))
        self.leaf_roots = trace.union.roots(torch.cat([flat[0], *(leaf.labels for leaf in trace.leaves)]))

    def _labels(self) -> Iterator[Tensor]:
        called = (tensor for call in self.calls for tensor in (*call.inputs, *call.outputs))
        returned = (tensor for result in self.results.values() for tensor in result.outputs)
        for tensor in itertools.chain(called, returned):
            yield from tensor.labels

    @cached_property
    def history(self) -> list[tuple[str, list[list[Tensor]]]]:
        """The operations of the pass, with the labels of their outputs."""
        roots = self.trace.union.roots
        return [(name, [[roots(x) for x in labels] for labels in outputs]) for name, outputs in self.trace.history]

    def span(self, label: Tensor) -> tuple[int, int]:
        """Return where the labels of a recorded tensor are in `roots`."""
        return self._spans[id(label)]


class Expectation:
    """What the recorded calls have to give when some channels are removed.

    Args:
        recording: of the pass with all channels.
        removed: labels of the channels that are removed.
    """

    def __init__(self, recording: Recording, removed: Tensor) -> None:
        self._recording = recording
        self.removed = torch.zeros(recording.trace.union.parent.numel(), dtype=torch.bool)
        self.removed[removed] = True
        self._kept = ~self.removed[recording.roots]
        self._count = [0, *self._kept.cumsum(0).tolist()]

    def kept_positions(self) -> dict[str, dict[int, Tensor]]:
        """Map tensor name -> dimension -> positions that are kept, where some are removed."""
        positions: dict[str, dict[int, Tensor]] = {}
        leaves = self._recording.trace.leaves
        sizes = [leaf.labels.numel() for leaf in leaves]
        kept = (~self.removed[self._recording.leaf_roots]).split(sizes)  # type: ignore[no-untyped-call]  # torch's own signature
        for leaf, mask in zip(leaves, kept, strict=True):
            if not mask.all():
                positions.setdefault(leaf.tensor, {})[leaf.dim] = mask.nonzero().reshape(-1)
        return positions

    def shape(self, tensor: Recorded) -> tuple[int, ...] | None:
        """Return the shape that ``tensor`` must have; None where its labels do not determine it."""
        shape = list(tensor.shape)
        for label in tensor.labels:
            start, end = self._recording.span(label)
            left = self._count[end] - self._count[start]
            dims = varying(label)
            if left == end - start:
                continue
            if len(dims) > 1:
                kept = self._kept[start:end].view(label.shape)
                sizes = {dim: int(kept.movedim(dim, 0).flatten(1).any(1).sum()) for dim in dims}
                if left != torch.Size(sizes.values()).numel():
                    return None
                shape = [min(size, sizes.get(dim, size)) for dim, size in enumerate(shape)]
            else:
                shape[dims[0]] = left
        return tuple(shape)

    def labels(self, tensor: Recorded) -> list[Tensor]:
        """Return the labels that ``tensor`` must have."""
        shape, found = self.shape(tensor), []
        for label in tensor.labels if shape is not None else ():
            start, end = self._recording.span(label)
            dims = set(varying(label))
            kept = self._recording.roots[start:end][self._kept[start:end]]
            sizes = [shape[dim] if dim in dims else 1 for dim in range(label.dim())]  # type: ignore[index]
            if kept.numel() == torch.Size(sizes).numel():
                found.append(kept.reshape(sizes))
        return found

    def removed_from(self, tensors: Sequence[Recorded]) -> Tensor:
        """Return the labels of the channels that ``tensors`` lose."""
        spans = [self._recording.span(label) for tensor in tensors for label in tensor.labels]
        labels = [self._recording.roots[start:end] for start, end in spans]
        found: Tensor = torch.unique(torch.cat([torch.empty(0, dtype=torch.long), *labels]))
        return found[self.removed[found]]
