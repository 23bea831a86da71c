"""Trace a forward pass: which operator call reads the result of which other one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import override

from lightning_light.example_input import ExampleInput
from lightning_light.isolation import isolated
from lightning_light.nested import tensors_in
from lightning_light.quantization.op_calls import OpCall, OpId, OpStack
from lightning_light.quantization.operators import FLOAT, INPUT, INTEGER, Operator, arguments, is_view, operator_of

__all__ = ["OpNode", "Trace", "inputs_of_layer", "trace_ops", "writable_parameters"]

_VIEW, _RELU6 = operator_of("view"), operator_of("relu6")


@dataclass(eq=False)
class OpNode:
    """An operator call of a traced forward pass, or an input of the network.

    Attributes:
        call: with its arguments and result; of an input, one that returns it.
        operator: entry of the op table; `FLOAT` where the form of this call has no int8 kernel.
        inputs: the nodes whose results it reads, with the position of the argument.
        users: the nodes that read its result.
        is_output: whether its result leaves the network.
    """

    call: OpCall
    operator: Operator
    inputs: list[tuple[int, OpNode]] = field(default_factory=list)
    users: list[OpNode] = field(default_factory=list)
    is_output: bool = False

    @property
    def id(self) -> OpId:
        """Of the call."""
        return self.call.id

    @property
    def role(self) -> str:
        """Of the operator."""
        return self.operator.role

    @property
    def returns_several(self) -> bool:
        """Whether the result is a tuple or list of tensors."""
        return not isinstance(self.call.result, Tensor)

    @property
    def only_user(self) -> OpNode | None:
        """The node that alone reads the result."""
        return self.users[0] if len(self.users) == 1 and not self.is_output else None

    def followers(self, *roles: str) -> dict[str, OpNode]:
        """Role -> the operator of that role, in this order, which alone reads the result so far."""
        tail, found = self, dict[str, OpNode]()
        for role in roles:
            follower = tail.only_user
            if follower is not None and follower.role == role:
                tail = found[role] = follower
        return found

    @property
    def named(self) -> dict[str, Any]:
        """The arguments of the call by name."""
        return arguments(self.call)

    @property
    def bounds(self) -> tuple[Any, ...]:
        """The lowest and the highest value of a clamp; None where there is none, nan where a tensor has them."""
        call, function = self.call, self.call.id.function
        if function not in operator_of("clamp").functions:
            return None, None
        ends = (("min", -1), ("max", 1)) if function.startswith("hardtanh") else (("min", None), ("max", None))
        found = (call.get(f"{end}_val", place, call.kwargs.get(end, at)) for place, (end, at) in enumerate(ends, 1))
        return tuple(math.nan if isinstance(value, Tensor) else value for value in found)

    @property
    def channel_dim(self) -> int:
        """The dimension of a layer's result that counts its output channels."""
        dims: int = self.call.result.dim()
        return dims - 1 if self.operator.name == "linear" else dims - self.named["weight"].dim() + 1

    def rerun(self, x: Tensor, **replaced: Any) -> Tensor:
        """The same operator on another input."""
        call = self.call
        if self.role in ("layer", "batch_norm"):
            result: Tensor = call.function(**{**self.named, "input": x, **replaced})
        else:
            result = call.function(x, *call.args[1:], **{n: v for n, v in call.kwargs.items() if n != "input"})
        return result


class Trace(OpStack):
    """Operator calls between inputs and outputs: of the network, or of the parts that a training step calls.

    Attributes:
        op_calls: all of them, in order.
    """

    def __init__(self) -> None:
        super().__init__(self._trace)
        self.op_calls: list[OpCall] = []
        self._nodes: dict[OpId, OpNode] = {}
        self._inputs = 0
        self._producers: Any = WeakIdKeyDictionary()  # tensor -> its node

    @property
    def nodes(self) -> list[OpNode]:
        """Those that depend on an input of the network."""
        return list(self._nodes.values())

    @override
    def begin(self, args: tuple[Any, ...]) -> None:
        self.enter(tensors_in(args))
        super().begin(args)

    @override
    def output(self, output: Any) -> None:
        for tensor in tensors_in(output):
            if (node := self._producers.get(tensor)) is not None:
                node.is_output = True

    def enter(self, tensors: Iterable[Tensor]) -> None:
        """Add a node for each of the inputs that no operator has produced."""
        for tensor in tensors:
            if tensor not in self._producers:
                call = OpCall(OpId("", 0, "input", self._inputs), nn.Identity(), [tensor], {}, tensor)
                self._producers[tensor] = OpNode(call, INPUT if tensor.is_floating_point() else INTEGER)
                self._inputs += 1

    def _trace(self, call: OpCall) -> Any:
        call.result = call.run()
        self.op_calls.append(call)
        made = list(tensors_in(call.result))
        tensors = ((position, tensor) for position, value in enumerate(call.values) for tensor in tensors_in(value))
        inputs = [(position, self._producers[tensor]) for position, tensor in tensors if tensor in self._producers]
        if call.id.function == "__get__" or not made or not (inputs or operator_of(call.id.function).role == "layer"):
            return call.result  # a property gives a view of its tensor at most
        if call.id not in self._nodes:  # else of a part that a training step calls again
            node = self._nodes[call.id] = OpNode(call, FLOAT, inputs)
            node.operator = _classify(node, made)
            for _, source in inputs:
                source.users.append(node)
        self._producers.update((tensor, self._nodes[call.id]) for tensor in made)
        return call.result


def trace_ops(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Trace:
    """Trace the operator calls of ``model(*args, **kwargs)`` in evaluation mode. ``model`` is as before.

    Python functions are seen as they are called, so a branch is the one that the example takes.
    """
    trace = Trace()
    trace.enter(tensors_in((args, dict(kwargs))))
    with isolated(model), trace.watching(model):
        model(*args, **kwargs)
    return trace


def inputs_of_layer(model: nn.Module, op: OpId, examples: Iterable[ExampleInput]) -> list[Tensor]:
    """What the layer call ``op`` reads in each forward pass: fake-quantized, where ``model`` is."""
    found: list[Tensor] = []

    def note(call: OpCall) -> Any:
        if call.id == op:
            found.append(call.input.detach().clone())  # a later operator may write into it
            raise _Stop
        return call.run()

    with OpStack(note).watching(model):
        for example in examples:
            with suppress(_Stop):
                model(*example.args, **example.kwargs)
    return found


class _Stop(Exception):  # noqa: N818  # a signal, no error
    """End a forward pass early."""


def writable_parameters(model: nn.Module, trace: Trace) -> dict[Any, str]:
    """Parameter -> name, for those of ``model`` that can be written without changing anything else.

    One operator reads them, as they are: they are neither tied, nor part of a computed weight.
    """
    computing = [call for call in trace.op_calls if any(True for _ in tensors_in(call.result))]
    uses = Counter(tensor for call in computing for tensor in tensors_in(call.values))
    return {parameter: name for name, parameter in model.named_parameters() if uses[parameter] == 1}


def _classify(node: OpNode, made: list[Tensor]) -> Operator:
    """The operator of a call; some forms of an operator have no int8 kernel."""
    call, inputs = node.call, node.inputs
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
    if operator.role == "batch_norm" and inputs[0][1].role == "layer" and inputs[0][1].channel_dim != 1:
        return FLOAT  # it normalizes another dimension than the one that the layer's weight can take a gain for
    if (call.id.function == "mean" and not _is_spatial(call)) or (operator is _VIEW and not is_view(call)):
        return FLOAT
    return _RELU6 if node.bounds == (0, 6) else operator


def _is_spatial(call: OpCall) -> bool:
    dims = call.get("dim", 1)
    listed = [dims] if isinstance(dims, int) else list(dims or [])
    return call.args[0].dim() == 4 and {dim % 4 for dim in listed} == {2, 3}
