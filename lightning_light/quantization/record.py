"""One forward pass, written down: which operation reads which one's result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_light.example_input import tensors_in
from lightning_light.measure.isolation import isolated
from lightning_light.quantization.operations import ADDING, HEAVY, kind_of, moves, name_of
from lightning_light.quantization.places import Frames

__all__ = ["Operation", "record"]


@dataclass(eq=False)
class Operation:
    """One operation of a forward pass, or an input of the network (of kind ``input``, without a key).

    Attributes:
        key: its name, as in `Frames`.
        kind: what it does, as in `kind_of`; ``int`` if its result has no floating point.
        name: what torch calls it.
        inputs: the operations whose results it reads, with the position of the argument.
        users: the operations that read its result.
        is_output: whether its result leaves the network.
        gives_several: whether its result is a tuple or list of tensors.
        bounds: of a clamp.
    """

    key: str
    kind: str
    name: str = ""
    inputs: list[tuple[int, Operation]] = field(default_factory=list)
    users: list[Operation] = field(default_factory=list)
    is_output: bool = False
    gives_several: bool = False
    bounds: tuple[float | None, float | None] = (None, None)


def record(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Operation]:
    """The operations of ``model(*args, **kwargs)`` in evaluation mode, in order. ``model`` is as before.

    Python functions are seen as they are called, so a branch is the one that the example takes.
    """
    with isolated(model):
        frames = Frames()
        frames.watch(model)
        recorder = _Recorder(frames)
        for tensor in tensors_in((args, dict(kwargs))):
            recorder.produce(tensor, Operation("", "input" if tensor.is_floating_point() else "int"))
        with recorder:
            result = model(*args, **kwargs)
        frames.let_go()
    for tensor in _tensors(result):
        if (operation := recorder.producers.get(id(tensor))) is not None:
            operation.is_output = True
    return recorder.operations


class _Recorder(TorchFunctionMode):
    def __init__(self, frames: Frames) -> None:
        super().__init__()
        self.frames = frames
        self.operations: list[Operation] = []
        self.producers: dict[int, Operation] = {}
        self._alive: list[Tensor] = []  # else another tensor could be given the same identity

    def produce(self, tensor: Tensor, operation: Operation) -> None:
        self.producers[id(tensor)] = operation
        self._alive.append(tensor)

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        key = self.frames.next_key(name)
        result = func(*args, **kwargs)
        made = list(_tensors(result))
        inputs = self._read(args, kwargs)
        if key is None or not made or (not inputs and kind_of(name) not in HEAVY):
            return result
        if name == "__get__":  # a property: only views (`.T`, `.mT`) give what was put in
            return result
        operation = Operation(key, _kind(name, args, kwargs, made, inputs), name, inputs)
        operation.gives_several = not isinstance(result, Tensor)
        if operation.kind == "clamp":
            operation.bounds = _bounds(name, args, kwargs)
            operation.kind = "relu6" if operation.bounds == (0.0, 6.0) else "clamp"
        for _, source in inputs:
            source.users.append(operation)
        self.operations.append(operation)
        for tensor in made:
            self.produce(tensor, operation)
        return result

    def _read(self, args: Any, kwargs: Mapping[str, Any]) -> list[tuple[int, Operation]]:
        given = [*args, *kwargs.values()]
        return [
            (place, self.producers[id(tensor)])
            for place, value in enumerate(given)
            for tensor in _tensors(value)
            if id(tensor) in self.producers
        ]


def _kind(name: str, args: Any, kwargs: Any, made: list[Tensor], inputs: list[tuple[int, Operation]]) -> str:
    """The kind of this call: some forms of an operation have no int8 kernel."""
    kind = kind_of(name)
    if not any(tensor.is_floating_point() for tensor in made):
        return "int"
    if kind in ADDING and moves(name, args, kwargs) and inputs[0][1].kind != "int":
        return "move"
    if kind in ADDING:
        shapes = {tuple(value.shape) for value in args if isinstance(value, Tensor)}
        if len(inputs) != 2 or (kind == "add" and len(shapes) != 1):
            return "float"  # a constant, or one that is spread over the other
    if kind in HEAVY and (len(inputs) != 1 or inputs[0][0] != 0):
        return "float"  # the weight is computed from the data
    if name == "mean" and not _is_over_space(args, kwargs):
        return "float"
    if kind == "move" and not moves(name, args, kwargs):
        return "float"
    return kind


def _is_over_space(args: Any, kwargs: Mapping[str, Any]) -> bool:
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    listed = [dims] if isinstance(dims, int) else list(dims or [])
    return args[0].dim() == 4 and {dim % 4 for dim in listed} == {2, 3}


def _bounds(name: str, args: Any, kwargs: Mapping[str, Any]) -> tuple[float | None, float | None]:
    usual = (-1.0, 1.0) if name.startswith("hardtanh") else (None, None)
    found = []
    for place, names in ((1, ("min_val", "min")), (2, ("max_val", "max"))):
        given = [kwargs[name] for name in names if name in kwargs]
        value = args[place] if len(args) > place else given[0] if given else usual[place - 1]
        found.append(float(value) if isinstance(value, int | float) else None)
    return found[0], found[1]


def _tensors(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        yield from tensors_in(value)
