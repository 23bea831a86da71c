"""Operations that only move elements: they are carried out on the marks themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_light.dependency.context import TraceContext
from lightning_light.dependency.labels import FIXED, varying
from lightning_light.dependency.rules.table import Marks, outputs_of, rule

__all__: list[str] = []

_RESHAPES = {"view", "_unsafe_view", "reshape", "_reshape_alias"}
_PICKS = {
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


@rule(
    "transpose",
    "permute",
    "t",
    "unsqueeze",
    "squeeze",
    "slice",
    "split",
    "split_with_sizes",
    "unsafe_split",
    "unsafe_split_with_sizes",
    "select",
    "unbind",
    "unsafe_chunk",
    "view",
    "_unsafe_view",
    "reshape",
    "_reshape_alias",
    "expand",
    "repeat",
    "flip",
    "roll",
    "index_select",
    "transpose_",
    "squeeze_",
    "unsqueeze_",
    "t_",
    "diagonal",
    "narrow",
)
def _moved(t: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Carry the same movement out on every mark."""
    source, outputs = args[0], outputs_of(out)
    shape = t.shape_before
    moved: list[Marks] = [[] for _ in outputs]
    for mark in t.marks(source):
        full = mark if name in _FREE_OF_SIZE else mark.expand(tuple(shape))
        full = full.clone() if name.endswith("_") else full
        results = [full.reshape(out.shape)] if name in _RESHAPES else outputs_of(t.again(full, args[1:], kwargs))
        tidy = [t.book.tidy(result) for result in results]
        _note_picks(t, name, mark, tidy)
        for slot, result in zip(moved, tidy, strict=True):
            slot.append(result)
    if name in _RESHAPES:
        moved = [[_in_equal_parts(t, mark) for mark in moved[0]]]
    for tensor, slot in zip(outputs, moved, strict=True):
        t.give(tensor, slot)


def _note_picks(t: TraceContext, name: str, mark: Tensor, results: Marks) -> None:
    """Which channels the code picked by position: the others are of another kind, though the same layers read them."""
    dims = varying(mark)
    if name not in _PICKS or len(dims) != 1:
        return
    t.history.append(("pick", [[result] for result in results]))
    if all(result.numel() < mark.numel() for result in results):
        picked = [result.reshape(-1) for result in results]
        sizes, channels = {labels.numel() for labels in picked}, mark.numel()
        size = sizes.pop() if len(sizes) == 1 else 0
        start = mark.reshape(-1).tolist().index(int(picked[0][0])) if size > 1 else 0
        if size > 1 and channels % size == 0 and start % size == 0:
            t.parts.append(mark.reshape(channels // size, size))
        t.apart += picked


def _in_equal_parts(t: TraceContext, mark: Tensor) -> Tensor:
    """Where one dimension became several, the same positions leave every part, or (for heads) whole parts leave."""
    dims = varying(mark)
    if len(dims) < 2:
        t.note_merge(mark)
        return mark
    rows = mark.movedim((dims[-2], dims[-1]), (0, 1)).flatten(1)[:, 0]
    whole_heads = t.splits_heads(rows)
    t.note_split(mark, dims)
    for dim in [*dims[:-2], dims[-1] if whole_heads else dims[-2]]:
        t.book.merge(mark, mark.narrow(dim, 0, 1))
    mark = t.book.tidy(mark)
    t.note_parts(mark, dims)
    return mark


@rule("cat", "concat", "concatenate", "stack")
def _joined(t: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Marks along the joined dimension stand end to end; across it they must agree."""
    tensors = [x for x in args[0] if x.dim() == args[0][-1].dim()]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    stacked = name == "stack"
    marks = [[m.unsqueeze(dim) if stacked else m for m in t.marks(x)] for x in tensors]
    sizes = [1 if stacked else x.shape[dim] for x in tensors]
    along = [next((m for m in own if m.shape[dim] > 1), None) for own in marks]
    result = [_end_to_end(along, sizes, dim, out.dim())] if any(m is not None for m in along) else []
    across = [[m for m in own if m.shape[dim] == 1] for own in marks]
    t.give(out, result + _agreed(t, across, out))


def _end_to_end(along: Sequence[Tensor | None], sizes: Sequence[int], dim: int, rank: int) -> Tensor:
    """One mark for the joined dimension; parts without channels of their own are `FIXED`."""
    parts = []
    for mark, size in zip(along, sizes, strict=True):
        shape = [size if d == dim else 1 for d in range(rank)]
        parts.append(torch.full(shape, FIXED) if mark is None else mark)
    common = [max(part.shape[d] for part in parts) for d in range(rank)]
    return torch.cat([part.expand([-1 if d == dim else common[d] for d in range(rank)]) for part in parts], dim)


def _agreed(t: TraceContext, across: Sequence[Marks], out: Tensor) -> Marks:
    """Channels of the other dimensions are the same in every part; a part without them holds the rest in place."""
    result: Marks = []
    for mark in (mark for own in across for mark in own):
        twins = [[other for other in own if set(varying(other)) & set(varying(mark))] for own in across]
        for twin in twins:
            if not twin:
                t.book.protect(mark, "is joined with a tensor of fixed size")
            for other in twin:
                t.book.merge(mark, other, "is joined with a tensor of fixed size")
        if not any(set(varying(mark)) & set(varying(other)) for other in result):
            result.append(mark)
    return result


@rule("constant_pad_nd")
def _padded(t: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Padded positions are `FIXED`: the size of the padding stands in the user's code."""
    pads = args[1]
    result = []
    for mark in t.marks(args[0]):
        own: list[int] = []
        for step in range(len(pads) // 2):
            own += pads[2 * step : 2 * step + 2] if mark.shape[-1 - step] > 1 else [0, 0]
        result.append(torch.constant_pad_nd(mark, own, FIXED))
    t.give(out, result)


@rule("pixel_shuffle")
def _pixels_shuffled(t: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """The ``r * r`` channels of one output channel leave together."""
    channels = t.along(args[0], args[0].dim() - 3)
    if channels is not None:
        grid = channels.view(out.shape[-3], -1)
        t.book.merge(grid, grid[:, :1])
        t.give(out, [grid[:, 0].reshape((1,) * (out.dim() - 3) + (-1, 1, 1))])


@rule("glu")
def _gated(t: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """The same positions leave the values and their gates."""
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", -1)) % out.dim()
    kept = []
    for mark in t.marks(args[0]):
        if mark.shape[dim] > 1:
            value, gate = mark.chunk(2, dim)
            t.book.merge(value, gate)
            mark = value
        kept.append(mark)
    t.give(out, kept)


@rule("channel_shuffle", "native_channel_shuffle")
def _channels_shuffled(t: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """The same positions leave every group."""
    channels = t.along(args[0], 1)
    if channels is not None:
        grid = channels.view(args[1], -1)
        t.book.merge(grid, grid[:1])
        t.give(out, [grid.t().reshape((1, -1) + (1,) * (out.dim() - 2))])
