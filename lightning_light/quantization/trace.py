"""Trace a forward pass: which operator call reads the result of which other one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_light.example_input import ExampleInput
from lightning_light.isolation import isolated
from lightning_light.module_stack import ModuleCall
from lightning_light.nested import tensors_in
from lightning_light.quantization.op_calls import OpCall, OpId, OpMode, OpStack
from lightning_light.quantization.operators import FLOAT, INPUT, INTEGER, Operator, is_view, operator_of

__all__ = ["OpNode", "Trace", "inputs_of_layer", "trace_ops"]

_VIEW, _RELU6 = operator_of("view"), operator_of("relu6")


@dataclass(eq=False)
class OpNode:
    """An operator call of a traced forward pass, or an input of the network.

    Attributes:
        call: with its arguments and result; None for an input.
        operator: entry of the op table; `FLOAT` where the form of this call has no int8 kernel.
        inputs: the nodes whose results it reads, with the position of the argument.
        users: the nodes that read its result.
        is_output: whether its result leaves the network.
        bounds: of a clamp.
    """

    call: OpCall | None
    operator: Operator
    inputs: list[tuple[int, OpNode]] = field(default_factory=list)
    users: list[OpNode] = field(default_factory=list)
    is_output: bool = False
    bounds: tuple[float | None, float | None] = (None, None)

    @property
    def id(self) -> OpId:
        """Of the call."""
        assert self.call is not None
        return self.call.id

    @property
    def role(self) -> str:
        """Of the operator."""
        return self.operator.role

    @property
    def returns_several(self) -> bool:
        """Whether the result is a tuple or list of tensors."""
        return self.call is not None and not isinstance(self.call.result, Tensor)

    @property
    def only_user(self) -> OpNode | None:
        """The node that alone reads the result."""
        return self.users[0] if len(self.users) == 1 and not self.is_output else None


@dataclass(frozen=True)
class Trace:
    """Operator calls of a forward pass, in order.

    Attributes:
        nodes: those that depend on an input of the network.
        calls: all of them.
    """

    nodes: list[OpNode]
    calls: list[OpCall]

    def node(self, op: OpId) -> OpNode:
        """The node of a call."""
        return next(node for node in self.nodes if node.id == op)


def trace_ops(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Trace:
    """Trace the operator calls of ``model(*args, **kwargs)`` in evaluation mode. ``model`` is as before.

    Python functions are seen as they are called, so a branch is the one that the example takes.
    """
    tracer = _Tracer()
    with isolated(model):
        stack = _Ends(tracer)
        stack.watch(model)
        for tensor in tensors_in((args, dict(kwargs))):
            tracer.produce(tensor, OpNode(None, INPUT if tensor.is_floating_point() else INTEGER))
        with OpMode(stack, tracer.handle):
            model(*args, **kwargs)
        stack.remove()
    return Trace(tracer.nodes, tracer.calls)


def inputs_of_layer(model: nn.Module, op: OpId, examples: Iterable[ExampleInput]) -> list[Tensor]:
    """What the layer call ``op`` reads in each forward pass: fake-quantized, where ``model`` is."""
    found: list[Tensor] = []

    def note(call: OpCall) -> Any:
        if call.id == op:
            found.append(call.input.detach().clone())  # a later operator may write into it
            raise _Stop
        return call.run()

    stack = OpStack()
    stack.watch(model)
    try:
        with OpMode(stack, note):
            for example in examples:
                with suppress(_Stop):
                    model(*example.args, **example.kwargs)
    finally:
        stack.remove()
    return found


class _Stop(Exception):  # noqa: N818  # ends a forward pass early
    pass


class _Ends(OpStack):
    """Finds the inputs and outputs of outermost calls: of the network, or of the parts that a training step calls."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    @override
    def entered(self, call: ModuleCall) -> None:
        super().entered(call)
        with torch._C.DisableTorchFunction():
            for tensor in _tensors(call.args) if self.outermost is call else ():
                if id(tensor) not in self._tracer.producers:
                    self._tracer.produce(tensor, OpNode(None, INPUT if tensor.is_floating_point() else INTEGER))

    @override
    def output(self, output: Any) -> None:
        for tensor in _tensors(output):
            if (node := self._tracer.producers.get(id(tensor))) is not None:
                node.is_output = True


class _Tracer:
    def __init__(self) -> None:
        self.nodes: list[OpNode] = []
        self._by_id: dict[OpId, OpNode] = {}
        self.calls: list[OpCall] = []
        self.producers: dict[int, OpNode] = {}
        self._alive: list[Tensor] = []  # else another tensor could get the same identity

    def produce(self, tensor: Tensor, node: OpNode) -> None:
        self.producers[id(tensor)] = node
        self._alive.append(tensor)

    def handle(self, call: OpCall) -> Any:
        call.result = call.run()
        self.calls.append(call)
        made = list(_tensors(call.result))
        inputs = [
            (position, self.producers[id(tensor)])
            for position, value in enumerate(call.values)
            for tensor in _tensors(value)
            if id(tensor) in self.producers
        ]
        is_layer = operator_of(call.id.function).role == "layer"
        if call.id.function == "__get__" or not made or not (inputs or is_layer):
            return call.result  # a property gives a view of its tensor at most
        node = OpNode(call, FLOAT, inputs)
        if self._by_id.setdefault(call.id, node) is not node:  # a part that a training step calls again
            for tensor in made:
                self.produce(tensor, self._by_id[call.id])
            return call.result
        if call.id.function in operator_of("clamp").functions:
            node.bounds = _bounds(call)
        node.operator = _classify(node, made)
        for _, source in inputs:
            source.users.append(node)
        self.nodes.append(node)
        for tensor in made:
            self.produce(tensor, node)
        return call.result


def _classify(node: OpNode, made: list[Tensor]) -> Operator:
    """The operator of a call; some forms of an operator have no int8 kernel."""
    call, inputs = node.call, node.inputs
    assert call is not None
    operator = operator_of(call.id.function)
    if not any(tensor.is_floating_point() for tensor in made):
        return INTEGER
    if operator.name in ("add", "mul"):
        if is_view(call) and inputs[0][1].role != "integer":
            return _VIEW
        shapes = {tuple(value.shape) for value in call.args if isinstance(value, Tensor)}
        if len(inputs) != 2 or (operator.name == "add" and len(shapes) != 1):
            return FLOAT  # a constant, or one operand is broadcast
    if operator.role == "layer" and (len(inputs) != 1 or inputs[0][0] != 0):
        return FLOAT  # the weight is computed from the data
    if (call.id.function == "mean" and not _is_spatial(call)) or (operator is _VIEW and not is_view(call)):
        return FLOAT
    return _RELU6 if node.bounds == (0.0, 6.0) else operator


def _is_spatial(call: OpCall) -> bool:
    dims = call.get("dim", 1)
    listed = [dims] if isinstance(dims, int) else list(dims or [])
    return call.args[0].dim() == 4 and {dim % 4 for dim in listed} == {2, 3}


def _bounds(call: OpCall) -> tuple[float | None, float | None]:
    low, high = (-1.0, 1.0) if call.id.function.startswith("hardtanh") else (None, None)
    found = call.get("min_val", 1, call.kwargs.get("min", low)), call.get("max_val", 2, call.kwargs.get("max", high))
    first, second = (float(value) if isinstance(value, int | float) else None for value in found)
    return first, second


def _tensors(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        yield from tensors_in(value)
