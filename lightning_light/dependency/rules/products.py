"""Matrix products and convolutions: where channels are read, and where they are made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_light.dependency.context import TraceContext
from lightning_light.dependency.labels import varying
from lightning_light.dependency.rules.table import FIXED_OPERAND, Marks, elementwise, rule

__all__: list[str] = []

_INPUT = "reads a tensor of fixed size (for instance the network's input)"


@rule("mm", "bmm", "addmm", "baddbmm")
def _product(t: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """The contracted dimension is one set of channels; rows, columns and batches pass through."""
    left, right = args[-2:] if name in {"mm", "bmm"} else args[1:3]
    read_left, made_left = _by_contraction(t, t.marks(left), -1)
    read_right, made_right = _by_contraction(t, [mark.transpose(-1, -2) for mark in t.marks(right)], -1)
    _contract(t, read_left, read_right)
    made = made_left + [mark.transpose(-1, -2) for mark in made_right]
    batches = _batches(t, (read_left + made_left, left), (read_right + made_right, right))
    t.give(out, [mark for mark in made if varying(mark)[-1:] and varying(mark)[-1] >= mark.dim() - 2] + batches)
    if name in {"addmm", "baddbmm"}:
        elementwise(t, name, [args[0], out], {}, out)


def _by_contraction(t: TraceContext, marks: Marks, dim: int) -> tuple[Marks, Marks]:
    """Split ``marks`` into those that vary along the contracted dimension (the last), and the others."""
    read: Marks = []
    made: Marks = []
    for mark in marks:
        if mark.shape[-1] > 1 and mark.shape[-2] > 1:
            t.book.protect(mark, "varies along both dimensions of a matrix product")
        (read if mark.shape[-1] > 1 else made).append(mark)
    return read, made


def _contract(t: TraceContext, lefts: Marks, rights: Marks) -> None:
    for marks, others in ((lefts, rights), (rights, lefts)):
        for mark in marks if not others else []:
            t.book.protect(mark, _INPUT)
    for left in lefts:
        for right in rights:
            t.book.merge(left, right, _INPUT)


def _batches(t: TraceContext, left: tuple[Marks, Tensor], right: tuple[Marks, Tensor]) -> Marks:
    """A batch dimension that carries channels (heads) is the same on both sides."""
    found: list[Marks] = []
    for marks, _ in (left, right):
        found.append([mark for mark in marks if mark.dim() > 2 and mark.shape[0] > 1 and len(varying(mark)) == 1])
    for own, others, other in ((found[0], found[1], right[1]), (found[1], found[0], left[1])):
        for mark in own:
            if not others and other.shape[0] > 1:
                t.book.protect(mark, FIXED_OPERAND)
            for twin in others:
                t.book.merge(mark, twin)
    return (found[0] + found[1])[:1]


@rule("convolution", "_convolution")
def _convolved(t: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Rows of the weight make channels, columns read them; grouped and depthwise ones have their own arithmetic."""
    source, weight, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
    for dim in range(2, weight.dim()):
        t.along(weight, dim, "is a kernel's size", only=True)
    channels = t.along(source, 1, "varies over space")
    reads, makes = t.along(weight, 0 if transposed else 1), t.along(weight, 1 if transposed else 0)
    if groups == 1:
        t.couple(channels, reads, _INPUT)
    elif weight.shape[0 if transposed else 1] == (groups if transposed else 1):
        makes = _depthwise(t, channels, reads if transposed else makes, out.shape[1] // groups, transposed)
    else:
        makes = _grouped(t, channels, reads, makes, groups, transposed)
    if makes is not None:
        if bias is not None:
            t.couple(t.along(bias, 0), makes, _INPUT)
        t.give(out, [makes.reshape((1, -1) + (1,) * (out.dim() - 2))])


def _depthwise(
    t: TraceContext, channels: Tensor | None, rows: Tensor | None, multiplier: int, transposed: bool
) -> Tensor | None:
    """A depthwise filter leaves with the channel it reads; its ``multiplier`` outputs leave together."""
    if rows is None:
        return None
    made = rows.repeat_interleave(multiplier) if transposed else rows
    by_input = made.view(-1, multiplier)
    t.book.merge(by_input, by_input[:, :1])
    t.couple(channels, by_input[:, 0], _INPUT)
    return made


def _grouped(
    t: TraceContext, channels: Tensor | None, reads: Tensor | None, makes: Tensor | None, groups: int, transposed: bool
) -> Tensor | None:
    """The same positions leave every group."""
    parts = None if channels is None else channels.view(groups, -1)
    if parts is not None:
        t.book.merge(parts, parts[:1])
    if reads is not None:
        reads = reads.view(groups if transposed else 1, -1)
        t.book.merge(reads, reads[:1])
        t.couple(None if parts is None else parts[0], reads[0], _INPUT)
    if makes is None:
        return None
    makes = makes.repeat(groups) if transposed else makes
    t.book.merge(makes.view(groups, -1), makes.view(groups, -1)[:1])
    return makes


@rule("embedding")
def _embedded(t: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """A table's columns are channels, its rows are the vocabulary."""
    t.along(args[0], 0, "is an entry of an embedding's vocabulary", only=True)
    columns = t.along(args[0], 1)
    if columns is not None:
        t.give(out, [columns.reshape((1,) * (out.dim() - 1) + (-1,))])
