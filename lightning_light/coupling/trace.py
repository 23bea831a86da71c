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

from lightning_light.coupling.labels import LabelBook, varying
from lightning_light.coupling.rules import RULES, elementwise, unknown
from lightning_light.errors import TraceError
from lightning_light.measure.quiet import plain_kernels, uncompiled

__all__ = ["FORWARD_ERRORS", "Leaf", "Split", "Tie", "Tracer", "leaf_tensors", "quiet", "trace"]

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

HEAD_COUNTS = ("num_heads", "n_heads", "nheads", "n_head", "nhead", "heads", "num_attention_heads")
HEAD_SIZES = ("head_dim", "dim_head", "d_head", "head_size", "attention_head_size", "d_k")
WIDTHS = ("embed_dim", "all_head_size", "inner_dim", "hidden_size", "d_model", "dim", "width")


Known: TypeAlias = "Mapping[tuple[str, int], Tensor]"


@dataclass(frozen=True)
class Leaf:
    """One dimension of one parameter or buffer, and the label of each of its positions."""

    tensor: str
    dim: int
    labels: Tensor


@dataclass(frozen=True)
class Tie:
    """An integer attribute of a module that counts channels: ``labels`` are those it counts."""

    module: str
    attribute: str
    labels: Tensor


@dataclass(frozen=True)
class Split:
    """A dimension that the user's code cut into parts (attention heads, shuffled groups), as it stood before."""

    module: str
    parts: Tensor
    width: Tensor | None


@dataclass(eq=False)
class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own signature
    """Follows labels through ATen operations.

    Attributes:
        heads: what leaves an attention: ``"head"`` (whole heads) or ``"dim"`` (the same position of every head).
        book: which labels are one channel, and which must stay.
        leaves: the dimensions that were labelled.
        ties: attributes that count channels.
        splits: dimensions that became heads or other parts.
        parts: labels, shape ``(parts, size)``, that the code took apart in equal parts, perhaps by ``chunk``.
        apart: labels that the code picked out of others by position.
        history: every operation, and the marks of its outputs.
        output_shapes: of the network.
    """

    heads: str = "dim"
    book: LabelBook = field(default_factory=LabelBook)
    leaves: list[Leaf] = field(default_factory=list)
    ties: list[Tie] = field(default_factory=list)
    splits: list[Split] = field(default_factory=list)
    parts: list[Tensor] = field(default_factory=list)
    apart: list[Tensor] = field(default_factory=list)
    history: list[tuple[str, list[list[Tensor]]]] = field(default_factory=list)
    output_shapes: list[tuple[int, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._marks: MutableMapping[Tensor, list[Tensor]] = WeakIdKeyDictionary()
        self._stack: list[tuple[str, nn.Module, Tensor | None]] = []
        self._function: Any = None
        self._names: MutableMapping[Tensor, str] = WeakIdKeyDictionary()
        self._counting: MutableMapping[Tensor, list[Tensor]] = WeakIdKeyDictionary()
        self._used: set[str] = set()
        self.shape_before: torch.Size = torch.Size()

    # What rules ask for.

    def marks(self, tensor: Tensor) -> list[Tensor]:
        """The marks of ``tensor``, tidied; those that vary nowhere are dropped."""
        tidy = [self.book.tidy(mark) for mark in self._marks.get(tensor, ())]
        return [mark for mark in tidy if varying(mark)]

    def give(self, tensor: Tensor, marks: Sequence[Tensor]) -> None:
        """``tensor`` carries ``marks`` from now on."""
        self._marks[tensor] = [mark for mark in marks if varying(mark)]

    def along(self, tensor: Tensor, dim: int, reason: str = "", *, only: bool = False) -> Tensor | None:
        """Labels along ``dim``, shape ``(size,)``; with ``reason``, what varies elsewhere is protected.

        With ``only`` nothing is returned, and what varies along ``dim`` is protected instead.
        """
        found = None
        for mark in self.marks(tensor):
            if mark.shape[dim] == 1 or only:
                if reason and (mark.shape[dim] > 1) == only:
                    self.book.protect(mark, reason)
                continue
            if len(varying(mark)) > 1:
                self.book.protect(mark, "varies along two dimensions at once")
            index = [slice(None) if d == dim % mark.dim() else 0 for d in range(mark.dim())]
            found = mark[tuple(index)] if found is None else found
        return found

    def couple(self, left: Tensor | None, right: Tensor | None, reason: str) -> None:
        """Merge two label vectors; where one side has none, the other must stay, for ``reason``."""
        if left is not None and right is not None:
            self.book.merge(left, right, reason)
        elif left is not None or right is not None:
            self.book.protect(left if left is not None else right, reason)  # type: ignore[arg-type]

    def give_indices(self, indices: Tensor, marks: Sequence[Tensor]) -> None:
        """The values of ``indices`` are numbers of channels: whoever uses them holds ``marks`` in place."""
        self._counting[indices] = list(marks)

    def again(self, tensor: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The operation at hand, on ``tensor`` in place of its first argument."""
        plain = [arg.cpu() if isinstance(arg, Tensor) else arg for arg in args]
        return self._function(tensor, *plain, **kwargs)

    def in_recurrent_layer(self) -> bool:
        """Whether the operation at hand runs inside an ``nn.RNNBase``."""
        return bool(self._stack) and isinstance(self._stack[-1][1], nn.RNNBase)

    def splits_heads(self, mark: Tensor) -> bool:
        """Whether the rows of ``mark`` are this module's attention heads, and whole heads are to leave."""
        module = self._stack[-1][1] if self._stack else None
        counts = [getattr(module, name, None) for name in HEAD_COUNTS]
        return self.heads == "head" and any(type(count) is int and _counts(count, mark) for count in counts)

    def tie(self, attribute: str, labels: Tensor | None) -> None:
        """The module at hand counts ``labels`` in ``attribute``, if it has it."""
        if labels is not None and self._stack and hasattr(self._stack[-1][1], attribute):
            number = getattr(self._stack[-1][1], attribute)
            once = type(number) is int and 1 < number < labels.numel()  # instance norm repeats them for every sample
            self.ties.append(Tie(self._stack[-1][0], attribute, labels[:number] if once else labels))

    def note_split(self, mark: Tensor, dims: Sequence[int]) -> None:
        """Remember how the user's code cut a dimension into parts."""
        if self._stack:
            name, _, width = self._stack[-1]
            self.splits.append(Split(name, mark.reshape([mark.shape[dim] for dim in dims]), width))

    def note_parts(self, mark: Tensor, dims: Sequence[int]) -> None:
        """Tie the attributes that count the heads, or a head's positions."""
        names, dim = (HEAD_COUNTS, dims[-2]) if mark.shape[dims[-2]] > 1 else (HEAD_SIZES, dims[-1])
        if mark.shape[dim] > 1:
            self._tie_by_name(names, mark)

    def note_merge(self, mark: Tensor) -> None:
        """Tie the attribute that names a width, where a reshape writes one."""
        if varying(mark):
            self._tie_by_name(WIDTHS, mark)

    def _tie_by_name(self, names: Sequence[str], mark: Tensor) -> None:
        module = self._stack[-1][1] if self._stack else None
        for name in names:
            if type(getattr(module, name, None)) is int and _counts(getattr(module, name), mark):
                self.tie(name, mark.reshape(-1)[: getattr(module, name)])

    # Watching.

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

    def after(self, positions: Mapping[str, Mapping[int, Tensor]]) -> tuple[LabelBook, Known]:
        """What to start a second trace with, when only ``positions`` of the tensors are left."""
        known = {}
        for leaf in self.leaves:
            labels, kept = self.book.roots(leaf.labels), positions.get(leaf.tensor, {}).get(leaf.dim)
            known[leaf.tensor, leaf.dim] = labels if kept is None else labels[kept]
        return LabelBook(torch.arange(self.book.parent.numel())), known

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
    book: LabelBook | None = None,
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
    tracer = Tracer(heads=heads, book=book or LabelBook())
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
    kernels = plain_kernels(convolutions=not recurrent)
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


def _counts(number: int, mark: Tensor) -> bool:
    """Whether ``mark`` (one varying dimension) is ``number`` labels, perhaps repeated as a whole."""
    flat = mark.reshape(-1)
    if not 1 < number <= flat.numel() or flat.numel() % number:
        return False
    return bool((flat.view(-1, number) == flat[:number]).all())


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
