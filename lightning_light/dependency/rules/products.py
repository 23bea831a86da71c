"""Rules for matrix products, convolutions and embeddings, which read channels and produce new ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_light.dependency.context import TraceContext
from lightning_light.dependency.labels import varying
from lightning_light.dependency.rules.table import FIXED_OPERAND, Labels, elementwise, rule

__all__: list[str] = []

_INPUT = "reads a tensor of fixed size (for instance the model input)"


@rule("mm", "bmm", "addmm", "baddbmm")
def _matrix_product(context: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Couple both operands along the contracted dimension; rows, columns and batches pass through."""
    left, right = args[-2:] if name in {"mm", "bmm"} else args[1:3]
    context.note_roles(left, read=-1, produced=-2)
    context.note_roles(right, read=-2, produced=-1)
    read_left, produced_left = _by_contraction(context, context.labels_of(left), -1)
    read_right, produced_right = _by_contraction(
        context, [label.transpose(-1, -2) for label in context.labels_of(right)], -1
    )
    _contract(context, read_left, read_right)
    produced = produced_left + [label.transpose(-1, -2) for label in produced_right]
    batches = _batches(context, (read_left + produced_left, left), (read_right + produced_right, right))
    context.set_labels(
        out, [label for label in produced if varying(label)[-1:] and varying(label)[-1] >= label.dim() - 2] + batches
    )
    if name in {"addmm", "baddbmm"}:
        elementwise(context, name, [args[0], out], {}, out)


def _by_contraction(context: TraceContext, labels: Labels, dim: int) -> tuple[Labels, Labels]:
    """Split ``labels`` into those that vary along the contracted dimension (the last), and the others."""
    read: Labels = []
    produced: Labels = []
    for label in labels:
        if label.shape[-1] > 1 and label.shape[-2] > 1:
            context.union.protect(label, "varies along both dimensions of a matrix product")
        (read if label.shape[-1] > 1 else produced).append(label)
    return read, produced


def _contract(context: TraceContext, lefts: Labels, rights: Labels) -> None:
    for labels, others in ((lefts, rights), (rights, lefts)):
        for label in labels if not others else []:
            context.union.protect(label, _INPUT)
    for left in lefts:
        for right in rights:
            context.union.merge(left, right, _INPUT)


def _batches(context: TraceContext, left: tuple[Labels, Tensor], right: tuple[Labels, Tensor]) -> Labels:
    """Couple the batch dimensions of both operands where they carry channels, such as heads."""
    found: list[Labels] = []
    for labels, _ in (left, right):
        found.append([label for label in labels if label.dim() > 2 and label.shape[0] > 1 and len(varying(label)) == 1])
    for own, others, other in ((found[0], found[1], right[1]), (found[1], found[0], left[1])):
        for label in own:
            if not others and other.shape[0] > 1:
                context.union.protect(label, FIXED_OPERAND)
            for twin in others:
                context.union.merge(label, twin)
    return (found[0] + found[1])[:1]


@rule("convolution", "_convolution")
def _convolution(context: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Couple the input with the weight's columns, and the output with its rows; per group where there are groups."""
    source, weight, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
    for dim in range(2, weight.dim()):
        context.along(weight, dim, "is a kernel dimension", only=True)
    channels = context.along(source, 1, "varies over spatial positions")
    reads, produces = context.along(weight, 0 if transposed else 1), context.along(weight, 1 if transposed else 0)
    if groups == 1:
        context.couple(channels, reads, _INPUT)
    elif weight.shape[0 if transposed else 1] == (groups if transposed else 1):
        produces = _depthwise(context, channels, reads if transposed else produces, out.shape[1] // groups, transposed)
    else:
        produces = _grouped(context, channels, reads, produces, groups, transposed)
    if produces is not None:
        if bias is not None:
            context.couple(context.along(bias, 0), produces, _INPUT)
        context.set_labels(out, [produces.reshape((1, -1) + (1,) * (out.dim() - 2))])


def _depthwise(
    context: TraceContext, channels: Tensor | None, rows: Tensor | None, multiplier: int, transposed: bool
) -> Tensor | None:
    """Couple a depthwise filter with the channel that it reads, and its ``multiplier`` outputs with each other."""
    if rows is None:
        return None
    produced = rows.repeat_interleave(multiplier) if transposed else rows
    by_input = produced.view(-1, multiplier)
    context.union.merge(by_input, by_input[:, :1])
    context.couple(channels, by_input[:, 0], _INPUT)
    return produced


def _grouped(
    context: TraceContext,
    channels: Tensor | None,
    reads: Tensor | None,
    produces: Tensor | None,
    groups: int,
    transposed: bool,
) -> Tensor | None:
    """Couple the same position of every group."""
    parts = None if channels is None else channels.view(groups, -1)
    if parts is not None:
        context.union.merge(parts, parts[:1])
    if reads is not None:
        reads = reads.view(groups if transposed else 1, -1)
        context.union.merge(reads, reads[:1])
        context.couple(None if parts is None else parts[0], reads[0], _INPUT)
    if produces is None:
        return None
    produces = produces.repeat(groups) if transposed else produces
    context.union.merge(produces.view(groups, -1), produces.view(groups, -1)[:1])
    return produces


@rule("embedding")
def _embedding(context: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Take the columns of the table as channels; its rows are kept."""
    context.along(args[0], 0, "is a row of an embedding table", only=True)
    columns = context.along(args[0], 1)
    if columns is not None:
        context.set_labels(out, [columns.reshape((1,) * (out.dim() - 1) + (-1,))])
