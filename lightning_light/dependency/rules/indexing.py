"""Rules for operations that select or write positions by index tensors: the other dimensions pass through."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_light.dependency.context import TraceContext
from lightning_light.dependency.labels import collapsed, varying
from lightning_light.dependency.rules.table import Labels, operands, rule, unknown

__all__: list[str] = []

_SELECTED = "is selected by an index"


@rule("index", "_unsafe_index")
def _index(context: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Run the operation on the labels of the dimensions without an index; protect those of the others."""
    source, indices = args[0], [None if x is None else x.cpu() for x in args[1]]
    dims = _indexed_dims(indices)
    moved: Labels = []
    for label in _outside(context, context.labels_of(source), dims):
        if out.numel():
            shape = [size if dim in dims else label.shape[dim] for dim, size in enumerate(source.shape)]
            label = collapsed(context.rerun(label.expand(shape), [indices], {}))
        elif label.numel() == prod(size or 1 for size in out.shape):
            label = label.reshape([size or 1 for size in out.shape])  # nothing is selected
        else:
            context.union.protect(label, _SELECTED)
            continue
        moved.append(label)
    context.set_labels(out, moved)


@rule("index_put", "index_put_", "_index_put_impl_")
def _index_put(context: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Pass the labels through where a constant is written."""
    if any(context.labels_of(tensor) for tensor in operands(args[2:], kwargs)):
        return unknown(context, name, args, kwargs, out)
    return context.set_labels(out, _outside(context, context.labels_of(args[0]), _indexed_dims(args[1])))


@rule("gather", "topk", "sort")
def _gather(context: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Pass the labels of the other dimensions through."""
    place = 2 if name == "topk" else 1
    dim = kwargs.get("dim", args[place] if len(args) > place else -1) % max(args[0].dim(), 1)
    kept = _outside(context, context.labels_of(args[0]), {dim})
    for tensor in (out,) if isinstance(out, Tensor) else out:
        context.set_labels(tensor, [x for x in kept if all(x.shape[d] in {1, tensor.shape[d]} for d in range(x.dim()))])


@rule(
    "scatter",
    "scatter_",
    "scatter_add",
    "scatter_add_",
    "scatter_reduce",
    "scatter_reduce_",
    "index_add",
    "index_add_",
    "index_copy",
    "index_copy_",
    "index_fill",
    "index_fill_",
)
def _scatter(context: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Couple what is written with what it is written to, along the dimensions without an index."""
    target, dim, _, source = args[:4]
    dim %= max(out.dim(), 1)
    labels = [x for x in (target, source) if isinstance(x, Tensor) and x.dim() == out.dim()]
    kept: Labels = []
    for label in (label for x in labels for label in _outside(context, context.labels_of(x), {dim})):
        twins = [other for other in kept if varying(other) == varying(label)]
        for twin in twins:
            context.union.merge(twin, label, "is written to a tensor of fixed size")
        kept += [] if twins else [label]
    context.set_labels(out, kept)


def _outside(context: TraceContext, labels: Labels, dims: set[int]) -> Labels:
    """Return the labels that do not vary along ``dims``, and protect the others."""
    for label in labels:
        if dims & set(varying(label)):
            context.union.protect(label, _SELECTED)
    return [label for label in labels if not dims & set(varying(label))]


def _indexed_dims(indices: Sequence[Tensor | None]) -> set[int]:
    """Return the dimensions that are indexed; a mask covers as many as it has itself."""
    dims: set[int] = set()
    place = 0
    for index in indices:
        count = index.dim() if index is not None and index.dtype in (torch.bool, torch.uint8) else 1
        dims |= set(range(place, place + count)) if index is not None else set()
        place += count
    return dims
