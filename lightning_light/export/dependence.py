"""Find the inputs of a model that its outputs are computed from."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from lightning_light.errors import ParityError, TraceError
from lightning_light.example_input import ExampleInput
from lightning_light.export.inputs import Positional, altered, batch_size, cloned, has_tensor, tripled
from lightning_light.export.parity import Tolerance, compare_outputs
from lightning_light.export.program import FAILURES, check_outputs
from lightning_light.isolation import plain_attention
from lightning_light.nested import named_leaves, tensors_in

__all__ = ["needed_inputs"]


def needed_inputs(model: Positional, example: ExampleInput, *, any_batch: bool) -> set[str]:
    """Return the places of the tensors that the outputs are computed from; of all of them where that is not certain.

    Operators are followed from the inputs to the outputs. What does not reach one (labels that only a loss reads) then
    stays at the values of the example in other calls, which have to give the same outputs: it may be needed for its
    shape, or through Python.

    Args:
        model: takes all inputs.
        example: a call of it.
        any_batch: whether other batch sizes are tried.

    Raises:
        TraceError: the model has no input that is a tensor, does not run on the example, or has outputs that no input
            reaches.
    """
    name = f"`{type(model.model).__name__}.forward`"
    if not model.names:
        raise TraceError(
            f"{name}: expected an input that is a tensor or holds tensors, found {list(model.constants)} without one: "
            "the file would be a constant. Export an example with tensors."
        )
    places, needed = _followed(model, example)
    if not needed:
        raise TraceError(
            f"{name}: expected outputs that are computed from {', '.join(places)}, found that no operation on tensors "
            "leads from them to an output: the file would be a constant. Values that pass through NumPy, lists, or "
            "objects in which no tensors are found become constants."
        )
    return needed if needed == places or _is_enough(model, needed, example, any_batch=any_batch) else places


def _followed(model: Positional, example: ExampleInput) -> tuple[set[str], set[str]]:
    """Return the places of the tensors of a call, and those that reach an output, or a number of Python."""
    mode, tensors = _Dependence(), model.tensors(cloned(example))
    places = _places_of(model, tensors)
    for place, tensor in places.items():
        mode.mark(tensor, {place})
    try:
        with plain_attention(), mode:
            outputs = model(*tensors)
    except FAILURES as error:
        raise TraceError(
            f"`{type(model.model).__name__}.forward` with {', '.join(model.names)}: expected it to run on a "
            f"batch of {batch_size(example)} on the CPU in evaluation mode, found {type(error).__name__}: {error}. "
            "Inputs without a batch dimension, a graph's for instance, need `batch='as_given'`."
        ) from error
    check_outputs(model.model, outputs)
    return set(places), mode.read.union(*map(mode.sources, tensors_in(outputs, objects=True)))


def _places_of(model: Positional, tensors: tuple[Any, ...]) -> dict[str, Tensor]:
    named = zip(model.names, tensors, strict=True)
    return {name + path: leaf for name, value in named for path, leaf in named_leaves(value)}


def _is_enough(model: Positional, needed: set[str], example: ExampleInput, *, any_batch: bool) -> bool:
    """Check that the inputs that are not needed may have any value."""
    fewer = Positional(model.model, example, keep=needed)
    calls = [altered(example), *([tripled(example)] if any_batch else [])]
    try:
        compare_outputs(
            lambda call: model(*model.tensors(cloned(call))),
            lambda call: fewer(*fewer.tensors(cloned(call))),
            [(1, call) for call in calls],
            Tolerance(absolute=0.0, relative=0.0),
        )
    except (ParityError, *FAILURES):
        return False
    return True


class _Dependence(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follow which inputs each memory of a tensor depends on.

    Attributes:
        read: inputs whose values became numbers of Python.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read: set[str] = set()
        self._sources: dict[int, set[str]] = {}
        self._held: list[object] = []  # else the memory of a tensor that is gone would be another's

    def mark(self, tensor: Tensor, sources: set[str]) -> None:
        """Add ``sources`` to what a tensor depends on."""
        key, holder = _memory(tensor)
        self._sources.setdefault(key, set()).update(sources)
        self._held.append(holder)

    def sources(self, tensor: Tensor) -> set[str]:
        """Return what a tensor depends on."""
        return self._sources.get(_memory(tensor)[0], set())

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        sources = set().union(*map(self.sources, tensors_in((args, kwargs))))
        out = func(*args, **kwargs)
        if sources:
            written = [
                a for s, a in zip(func._schema.arguments, args, strict=False) if s.alias_info and s.alias_info.is_write
            ]
            written += [a for name, a in kwargs.items() if name == "out"]
            for tensor in tensors_in((out, written)):
                self.mark(tensor, sources)
            if not (written or has_tensor(out)):
                self.read |= sources
        return out


def _memory(tensor: Tensor) -> tuple[int, object]:
    """Return the identity of a tensor's memory, which its views share, and what keeps it alive."""
    try:
        storage = tensor.untyped_storage()
    except (RuntimeError, NotImplementedError):  # a sparse or quantized layout without one
        return id(tensor), tensor
    return storage._cdata, storage
