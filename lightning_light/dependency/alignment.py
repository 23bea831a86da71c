"""Whether every channel of a network that has lost some still arrives where it arrived before."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_light.dependency.labels import FIXED, LabelUnion, collapsed
from lightning_light.dependency.trace import Tracer

__all__ = ["misaligned"]

_QUIET = {
    "clone",
    "contiguous",
    "_to_copy",
    "alias",
    "detach",
    "view",
    "_unsafe_view",
    "reshape",
    "_reshape_alias",
    "expand",
}
"""What torch inserts or leaves out as strides are; it changes no channel that the next operation would not show."""


def misaligned(before: Tracer, after: Tracer, gone: Tensor, lone: Tensor) -> str | None:
    """What went wrong in the pass ``after``, traced with the labels of ``before`` without those in ``gone``.

    Two channels that were apart may not meet, and every operation must see the channels that it saw, in their order.
    The order is compared where both passes are the same operations. Nothing is compared where a channel in ``lone`` is
    the last of its kind: a dimension of one position carries no mark.
    """
    if after.output_shapes != before.output_shapes:
        return f"the output's shape would change from {before.output_shapes} to {after.output_shapes}"
    if lone.numel():
        return None
    known = torch.unique(torch.cat([torch.zeros(1).long(), *(before.book.roots(x.labels) for x in before.leaves)]))
    if not torch.equal(after.book.roots(known), known):
        return "channels would meet others than before"
    stays = torch.zeros(max(before.book.parent.numel(), after.book.parent.numel()), dtype=torch.bool)
    stays[known] = True
    stays[gone] = False
    old = [step for step in before.history if step[0] not in _QUIET]
    new = [step for step in after.history if step[0] not in _QUIET]
    if [name for name, _ in old] != [name for name, _ in new]:
        old, new = old[-1:], new[-1:]
    for (name, was), (_, now) in zip(old, new, strict=True):
        if len(was) != len(now):
            return f"`{name}` would give {len(now)} tensors instead of {len(was)}"
        for left, right in zip(was, now, strict=True):
            if _orders(before.book, left, stays, name) != _orders(after.book, right, stays, name):
                return f"`{name}` would take other channels than before"
    return None


def _orders(book: LabelUnion, marks: list[Tensor], stays: Tensor, name: str) -> set[tuple[int, ...]]:
    """The channels that stay along every marked dimension, in order; a lone one only where it was picked."""
    orders = set()
    for mark in marks:
        order = collapsed(book.roots(mark)).reshape(-1)
        orders.add(tuple(order[stays[order]].tolist()))
    least = 1 if name == "pick" else 2
    return {order for order in orders if len(set(order) - {FIXED}) >= least}
