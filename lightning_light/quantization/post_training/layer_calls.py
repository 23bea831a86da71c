"""Layers of a traced network: run one again with another input or weight, and find the parameters it may change."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, nn

from lightning_light.nested import tensors_in
from lightning_light.quantization.operators import arguments
from lightning_light.quantization.trace import OpNode, Trace

__all__ = ["WritableParameters", "channel_dim", "named", "rerun"]


def named(node: OpNode) -> dict[str, Any]:
    """The arguments of a call by name."""
    assert node.call is not None
    return arguments(node.call)


def channel_dim(node: OpNode) -> int:
    """The dimension of the result that counts output channels."""
    assert node.call is not None
    if node.operator.name == "linear":
        return -1
    return 1 if node.role == "batch_norm" else int(node.call.result.dim() - named(node)["weight"].dim() + 1)


def rerun(node: OpNode, x: Tensor, **replaced: Any) -> Tensor:
    """The same operator on another input."""
    assert node.call is not None
    if node.role in ("layer", "batch_norm"):
        result: Tensor = node.call.function(**{**named(node), "input": x, **replaced})
    else:
        options = {name: value for name, value in node.call.kwargs.items() if name != "input"}
        result = node.call.function(x, *node.call.args[1:], **options)
    return result


class WritableParameters:
    """The parameters of ``model`` that can be written without changing anything else.

    Those that one operator reads, as they are: neither tied, nor part of a computed weight.
    """

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._uses = Counter(
            id(tensor)
            for call in trace.calls
            if any(True for _ in tensors_in([call.result]))
            for tensor in tensors_in([*call.args, call.kwargs])
            if id(tensor) in self._names
        )

    def name_of(self, tensor: Tensor | None) -> str | None:
        """Its name in ``named_parameters``; None if it must not be written."""
        return self._names.get(id(tensor)) if self._uses[id(tensor)] == 1 else None
