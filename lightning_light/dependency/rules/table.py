"""The table of rules by operation, and the two rules for operations that are not in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from lightning_light.dependency.context import TraceContext
from lightning_light.dependency.labels import varying

__all__ = ["RULES", "Labels", "Rule", "elementwise", "operands", "outputs_of", "rule", "unknown"]

Labels: TypeAlias = list[Tensor]
Rule: TypeAlias = "Callable[[TraceContext, str, Sequence[Any], dict[str, Any], Any], None]"
RULES: dict[str, Rule] = {}

FIXED_OPERAND = "is combined with a tensor of fixed size (an input, or a constant created in `forward`)"


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the decorated function for the operations ``names`` (of ``torch.ops.aten``)."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def outputs_of(out: Any) -> list[Tensor]:
    """List the tensors of an operation's result, in order."""
    return [item for item in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(item, Tensor)]


def operands(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """List the tensors that an operation reads, in order."""
    return [tensor for value in [*args, *kwargs.values()] for tensor in outputs_of(value)]


def unknown(context: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Protect the channels of the inputs, and give the output none: the rule for operations without a rule."""
    for tensor in operands(args, kwargs):
        for label in context.labels_of(tensor):
            context.union.protect(label, f"passes through `{name}`, which has no tracing rule")


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
    "bernoulli_",
    "uniform_",
    "normal_",
    "exponential_",
    "random_",
)
def elementwise(context: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Couple the labels of all operands position by position; those that are kept end here."""
    output = outputs_of(out)[0]
    rank = output.dim()
    inputs = [tensor for tensor in operands(args, kwargs) if tensor.dim() <= rank]
    kept: Labels = []
    for tensor in inputs:
        for label in context.labels_of(tensor):
            padded = label.reshape((1,) * (rank - label.dim()) + tuple(label.shape))
            if _meets_fixed_size(padded, tensor, inputs, context):
                context.union.protect(padded, FIXED_OPERAND)
            else:
                kept = _merged_with(context, kept, padded)
    context.set_labels(output, kept)


@rule(
    "mse_loss",
    "smooth_l1_loss",
    "huber_loss",
    "soft_margin_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
)
def _loss(context: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Couple what is compared position by position: with a target it is kept, with another output it is removed."""
    larger = args[0] if args[0].dim() >= args[1].dim() else args[1]
    elementwise(context, name, args[:2], {}, larger)
    if out.dim():
        context.set_labels(out, context.labels_of(larger))


@rule("nll_loss_forward", "nll_loss2d_forward", "multi_margin_loss", "multilabel_margin_loss_forward")
def _class_scores(context: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Keep the scores of classes, whose positions are what labels count."""
    for label in context.labels_of(args[0]):
        context.union.protect(label, "holds class scores, which a loss compares with labels")


def _merged_with(context: TraceContext, kept: Labels, label: Tensor) -> Labels:
    """Merge ``label`` with those that share a dimension; of two where one covers the other, keep the larger."""
    dims = set(varying(label))
    for other in kept:
        if dims & set(varying(other)):
            context.union.merge(other, label, "is added to zero-padded channels")
    if any(dims <= set(varying(other)) for other in kept):
        return kept
    return [other for other in kept if not set(varying(other)) < dims] + [label]


def _meets_fixed_size(label: Tensor, owner: Tensor, inputs: Sequence[Tensor], context: TraceContext) -> bool:
    """Check whether another operand has full size and no channels of its own that could be removed."""
    for other in inputs:
        if other is owner:
            continue
        missing = label.dim() - other.dim()
        shape = (1,) * missing + tuple(other.shape)
        covered = {dim + missing for own in context.labels_of(other) for dim in varying(own)}
        strides = (0,) * missing + other.stride()  # 0: expanded from size one, to the size that the others have
        if any(shape[dim] > 1 and strides[dim] and dim not in covered for dim in varying(label)):
            return True
    return False
