"""The table that rules register in, and the two rules that need no table: elementwise and unknown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from lightning_light.dependency.context import TraceContext
from lightning_light.dependency.labels import varying

__all__ = ["RULES", "Marks", "Rule", "elementwise", "outputs_of", "rule", "unknown"]

Marks: TypeAlias = list[Tensor]
Rule: TypeAlias = "Callable[[TraceContext, str, Sequence[Any], dict[str, Any], Any], None]"
RULES: dict[str, Rule] = {}

FIXED_OPERAND = "meets a tensor of fixed size (an input, or a constant made in `forward`)"


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the decorated function for the operations ``names`` (of ``torch.ops.aten``)."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def outputs_of(out: Any) -> list[Tensor]:
    """The tensors of an operation's result, in order."""
    return [item for item in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(item, Tensor)]


def _tensors(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    return [tensor for value in [*args, *kwargs.values()] for tensor in outputs_of(value)]


def unknown(t: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """An operation without a rule: its inputs' channels stay, its output has none."""
    for tensor in _tensors(args, kwargs):
        for mark in t.marks(tensor):
            t.book.protect(mark, f"goes through `{name}`, whose effect on channels is not known")


@rule(
    "detach",
    "alias",
    "clone",
    "_to_copy",
    "contiguous",
    "lift_fresh",
    "_softmax",
    "_log_softmax",
    "_safe_softmax",
    "cumsum",
    "native_dropout",
    "zeros_like",
    "ones_like",
    "empty_like",
    "rand_like",
    "randn_like",
    "full_like",
    "hardtanh",
    "hardtanh_",
    "hardswish",
    "hardswish_",
    "_prelu_kernel",
    "copy_",
    "softplus",
    "celu",
    "elu",
    "gelu",
    "rrelu",
    "masked_fill",
    "masked_fill_",
    "bernoulli",
)
def elementwise(t: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Position meets position: marks on the same dimensions are the same channels."""
    output = outputs_of(out)[0]
    rank = output.dim()
    inputs = [tensor for tensor in _tensors(args, kwargs) if tensor.dim() <= rank]
    kept: Marks = []
    for tensor in inputs:
        for mark in t.marks(tensor):
            padded = mark.reshape((1,) * (rank - mark.dim()) + tuple(mark.shape))
            _protect_where_fixed(t, padded, tensor, inputs, rank)
            kept = _met(t, kept, padded)
    t.give(output, kept)


def _met(t: TraceContext, kept: Marks, mark: Tensor) -> Marks:
    """Merge ``mark`` with those that share a dimension; of nested ones the larger is kept."""
    dims = set(varying(mark))
    for other in kept:
        if dims & set(varying(other)):
            t.book.merge(other, mark, "is added to zero-padded channels")
    if any(dims <= set(varying(other)) for other in kept):
        return kept
    return [other for other in kept if not set(varying(other)) < dims] + [mark]


def _protect_where_fixed(t: TraceContext, mark: Tensor, owner: Tensor, inputs: Sequence[Tensor], rank: int) -> None:
    """An operand of full size that has no channel of its own to lose holds ``mark`` in place."""
    for other in inputs:
        if other is owner:
            continue
        missing = rank - other.dim()
        shape = (1,) * missing + tuple(other.shape)
        covered = {dim + missing for own in t.marks(other) for dim in varying(own)}
        strides = (0,) * missing + other.stride()  # 0: expanded from size one, to the size that the others have
        if any(shape[dim] > 1 and strides[dim] and dim not in covered for dim in varying(mark)):
            t.book.protect(mark, FIXED_OPERAND)
