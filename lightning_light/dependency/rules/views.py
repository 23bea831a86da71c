"""Rules for operations that only move elements: they are carried out on the labels themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_light.dependency.context import TraceContext
from lightning_light.dependency.labels import FIXED, collapsed, varying
from lightning_light.dependency.rules.table import Labels, outputs_of, rule

__all__: list[str] = []

_RESHAPES = {"view", "_unsafe_view", "reshape", "_reshape_alias"}
_SELECTIONS = {
    "slice",
    "split",
    "split_with_sizes",
    "unsafe_split",
    "unsafe_split_with_sizes",
    "select",
    "unbind",
    "unsafe_chunk",
    "index_select",
    "narrow",
    "diagonal",
}
_FREE_OF_SIZE = {"transpose", "permute", "t", "unsqueeze", "transpose_", "t_", "unsqueeze_"}


@rule(*_RESHAPES, *_SELECTIONS, *_FREE_OF_SIZE, "squeeze", "squeeze_", "expand", "repeat", "flip", "roll")
def _view(context: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Run the operation on the labels."""
    source, outputs = args[0], outputs_of(out)
    shape = [size or 1 for size in context.shape_before]  # an empty batch has channels too
    moved: list[Labels] = [[] for _ in outputs]
    for label in context.labels_of(source):
        if name in _RESHAPES:
            results = [_in_new_shape(label, shape, [size or 1 for size in out.shape])]
        else:
            full = label if name in _FREE_OF_SIZE else label.expand(tuple(shape))
            full = full.clone() if name.endswith("_") else full
            results = outputs_of(context.rerun(full, args[1:], kwargs))
        reduced = [collapsed(result) for result in results]
        _note_selection(context, name, label, reduced)
        for slot, result in zip(moved, reduced, strict=True):
            slot.append(result)
    if name in _RESHAPES:
        to_map = _makes_map(context, shape, out.shape)
        moved = [_one_per_dimension(context, [_reshaped(context, label, to_map) for label in moved[0]])]
    for tensor, slot in zip(outputs, moved, strict=True):
        context.set_labels(tensor, slot)
        context.follow_parameter(source, tensor, _dims_after(name, len(shape), args[1:]))


def _dims_after(name: str, rank: int, args: Sequence[Any]) -> list[int] | None:
    """Return which dimension of its input each dimension of a view is; None for other views."""
    dims = list(range(rank))
    if name == "t":
        return dims[::-1]
    if name == "permute":
        return [dims[dim] for dim in args[0]]
    if name == "transpose":
        dims[args[0]], dims[args[1]] = dims[args[1]], dims[args[0]]
        return dims
    if name in {"select", "unbind"}:
        del dims[args[0] if args else 0]
        return dims
    return None


def _in_new_shape(label: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """Reshape ``label`` from the shape ``before`` to ``after``, expanding only the dimensions that it varies along.

    Both shapes are split into the shortest blocks of dimensions with equal products; a block along which the label does
    not vary has size one in the result.
    """
    if prod(before) != prod(after):  # a view of another dtype
        return label.expand(tuple(before)).reshape(tuple(after))
    expanded: list[int] = []
    result: list[int] = []
    for old, new in _blocks(before, after):
        varies = any(label.shape[dim] > 1 for dim in old)
        expanded += [before[dim] if varies else 1 for dim in old]
        result += [after[dim] if varies else 1 for dim in new]
    return label.expand(expanded).reshape(result)


def _blocks(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[range, range]]:
    """Yield the dimensions of two shapes of one size in the shortest blocks whose products agree."""
    left = right = 0
    while left < len(before) or right < len(after):
        old, new = left, right
        left, right = min(left + 1, len(before)), min(right + 1, len(after))
        while (a := prod(before[old:left])) != (b := prod(after[new:right])):
            if a < b:
                left += 1
            else:
                right += 1
        yield range(old, left), range(new, right)


def _note_selection(context: TraceContext, name: str, label: Tensor, results: Labels) -> None:
    """Note which channels the code selects by position: they form a group of their own."""
    dims = varying(label)
    if name not in _SELECTIONS or len(dims) != 1:
        return
    context.history.append(("select", [[result] for result in results]))
    if all(result.numel() < label.numel() for result in results):
        selected = [result.reshape(-1) for result in results]
        sizes, channels = {labels.numel() for labels in selected}, label.numel()
        size = sizes.pop() if len(sizes) == 1 else 0
        start = label.reshape(-1).tolist().index(int(selected[0][0])) if size > 1 else 0
        if size > 1 and channels % size == 0 and start % size == 0:
            context.parts.append(label.reshape(channels // size, size))
        context.selected += selected
        for result in results:
            context.note_selection(result)


def _makes_map(context: TraceContext, before: Sequence[int], after: Sequence[int]) -> bool:
    """Check whether features ``(N, C * H * H)`` become a map ``(N, C, H, H)``, which has no attention heads."""
    square = len(before) == 2 and len(after) == 4 and after[0] == before[0] and after[2] == after[3]
    return square and not context.counts_heads(after[1:3])


def _reshaped(context: TraceContext, label: Tensor, to_map: bool) -> Tensor:
    """Couple the same position of every part where a dimension is split; or, for heads, all positions of a part.

    Where features become a map, all positions of a channel are coupled.
    """
    dims = varying(label)
    if len(dims) < 2:
        context.note_merge(label)
        return label
    if to_map and dims == (1, 2, 3):
        context.union.merge(label, label[:, :, :1, :1])
        return context.union.canonical(label)
    rows = label.movedim((dims[-2], dims[-1]), (0, 1)).flatten(1)[:, 0]
    whole_heads = context.splits_heads(rows)
    context.note_split(label, dims)
    for dim in [*dims[:-2], dims[-1] if whole_heads else dims[-2]]:
        context.union.merge(label, label.narrow(dim, 0, 1))
    label = context.union.canonical(label)
    context.note_parts(label, dims)
    return label


def _one_per_dimension(context: TraceContext, labels: Labels) -> Labels:
    """Keep one label tensor per dimension: where a reshape merges two dimensions with channels, that of the inner one.

    The channels of the outer dimension are protected: what the merged dimension holds of one of them is a whole block.
    """
    kept: dict[int, Tensor] = {}
    for label in sorted((label for label in labels if len(varying(label)) == 1), key=_changes):
        outer = kept.get(varying(label)[0], label)
        if not torch.equal(context.union.roots(outer), context.union.roots(label)):
            context.union.protect(outer, "is the outer part of a dimension that a reshape merges, as heads are")
        kept[varying(label)[0]] = label
    return [label for label in labels if len(varying(label)) != 1] + list(kept.values())


def _changes(label: Tensor) -> int:
    flat = label.reshape(-1)
    return int((flat[1:] != flat[:-1]).sum())


@rule("cat", "concat", "concatenate", "stack")
def _concatenation(context: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Concatenate the labels along the joined dimension, and couple those across it."""
    tensors = [x for x in args[0] if x.dim() == args[0][-1].dim()]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    stacked = name == "stack"
    labels = [[m.unsqueeze(dim) if stacked else m for m in context.labels_of(x)] for x in tensors]
    sizes = [1 if stacked else x.shape[dim] for x in tensors]
    along = [next((m for m in own if m.shape[dim] > 1), None) for own in labels]
    result = [_concatenated(along, sizes, dim, out.dim())] if any(m is not None for m in along) else []
    across = [[m for m in own if m.shape[dim] == 1] for own in labels]
    context.set_labels(out, result + _across(context, across, out))


def _concatenated(along: Sequence[Tensor | None], sizes: Sequence[int], dim: int, rank: int) -> Tensor:
    """Concatenate the labels of the joined dimension; parts without channels of their own are `FIXED`."""
    parts = []
    for label, size in zip(along, sizes, strict=True):
        shape = [size if d == dim else 1 for d in range(rank)]
        parts.append(torch.full(shape, FIXED) if label is None else label)
    common = [max(part.shape[d] for part in parts) for d in range(rank)]
    return torch.cat([part.expand([-1 if d == dim else common[d] for d in range(rank)]) for part in parts], dim)


def _across(context: TraceContext, across: Sequence[Labels], out: Tensor) -> Labels:
    """Couple the channels of the other dimensions over all parts; a part without channels protects the rest."""
    result: Labels = []
    for label in (label for own in across for label in own):
        others_of = [[other for other in own if set(varying(other)) & set(varying(label))] for own in across]
        for other_labels in others_of:
            if not other_labels:
                context.union.protect(label, "is concatenated with a tensor of fixed size")
            for other in other_labels:
                context.union.merge(label, other, "is concatenated with a tensor of fixed size")
        if not any(set(varying(label)) & set(varying(other)) for other in result):
            result.append(label)
    return result


@rule("constant_pad_nd")
def _constant_padding(context: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Label padded positions `FIXED`: the size of the padding is fixed in the user's code."""
    pads = args[1]
    result = []
    for label in context.labels_of(args[0]):
        own: list[int] = []
        for step in range(len(pads) // 2):
            own += pads[2 * step : 2 * step + 2] if label.shape[-1 - step] > 1 else [0, 0]
        result.append(torch.constant_pad_nd(label, own, FIXED))
    context.set_labels(out, result)


@rule("pixel_shuffle")
def _pixel_shuffle(context: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Couple the ``r * r`` input channels of each output channel."""
    channels = context.along(args[0], args[0].dim() - 3)
    if channels is not None:
        rows = channels.view(out.shape[-3], -1)
        context.union.merge(rows, rows[:, :1])
        context.set_labels(out, [rows[:, 0].reshape((1,) * (out.dim() - 3) + (-1, 1, 1))])


@rule("glu")
def _glu(context: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Couple the values with their gates."""
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", -1)) % out.dim()
    kept = []
    for label in context.labels_of(args[0]):
        if label.shape[dim] > 1:
            value, gate = label.chunk(2, dim)
            context.union.merge(value, gate)
            label = value
        kept.append(label)
    context.set_labels(out, kept)


@rule("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(context: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Couple the same position of every group."""
    channels = context.along(args[0], 1)
    if channels is not None:
        rows = channels.view(args[1], -1)
        context.union.merge(rows, rows[:1])
        context.set_labels(out, [rows.t().reshape((1, -1) + (1,) * (out.dim() - 2))])
