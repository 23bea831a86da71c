"""Check that every channel of a pruned network reaches the operations that it reached before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_light.dependency.labels import FIXED, collapsed
from lightning_light.dependency.trace import Tracer

__all__ = ["channel_orders", "misalignment", "paired_steps"]

Step: TypeAlias = "tuple[str, list[list[Tensor]]]"

_COPIES = {"clone", "contiguous", "_to_copy"}
_LAYOUT_OPS = _COPIES | {"alias", "detach", "view", "_unsafe_view", "reshape", "_reshape_alias", "expand"}
"""Operations that torch inserts or omits depending on strides; a change would show at the next operation too."""


def misalignment(before: Tracer, after: Tracer, removed: Tensor, single: Tensor) -> str | None:
    """Describe the first difference between two traced passes that removing channels must not cause, or return None.

    Channels that were separate must stay separate, and every operation must read the channels that it read before, in
    the same order. The order is compared where both passes run the same operations. Nothing is compared where
    ``single`` is not empty, because a dimension of size one carries no labels.

    Args:
        before: the trace of the model as it is.
        after: the trace of the pruned model, started with the labels of ``before`` without those in ``removed``.
        removed: labels of the channels that were removed.
        single: labels of channels that are the only ones left of their group.
    """
    if after.output_shapes != before.output_shapes:
        return f"the output's shape would change from {before.output_shapes} to {after.output_shapes}"
    if single.numel():
        return None
    known = torch.unique(torch.cat([torch.zeros(1).long(), *(before.union.roots(x.labels) for x in before.leaves)]))
    if not torch.equal(after.union.roots(known), known):
        return "channels would be combined with other channels than before"
    remaining = torch.zeros(max(before.union.parent.numel(), after.union.parent.numel()), dtype=torch.bool)
    remaining[known] = True
    remaining[removed] = False
    for (name, was), (_, now) in paired_steps(before.history, after.history):
        if len(was) != len(now):
            return f"`{name}` would give {len(now)} tensors instead of {len(was)}"
        for left, right in zip(was, now, strict=True):
            if channel_orders([before.union.roots(label) for label in left], remaining, name) != channel_orders(
                [after.union.roots(label) for label in right], remaining, name
            ):
                return f"`{name}` would read other channels than before"
    return None


def paired_steps(before: Iterable[Step], after: Iterable[Step]) -> Iterator[tuple[Step, Step]]:
    """Pair the operations of two passes, and the labels of their outputs; the last alone where they run others."""
    old, new = ([step for step in steps if step[0] not in _LAYOUT_OPS] for steps in (before, after))
    if [name for name, _ in old] != [name for name, _ in new]:
        old, new = old[-1:], new[-1:]
    return zip(old, new, strict=False)


def channel_orders(labels: list[Tensor], remaining: Tensor, name: str) -> set[tuple[int, ...]]:
    """Return the remaining channels along every labelled dimension, in order; a single one only after a selection.

    Args:
        labels: representatives of the labels of one tensor.
        remaining: which labels remain, as a mask over all labels.
        name: of the operation.
    """
    orders = set()
    for label in labels:
        order = collapsed(label).reshape(-1)
        orders.add(tuple(order[remaining[order]].tolist()))
    least = 1 if name == "select" else 2
    return {order for order in orders if len(set(order) - {FIXED}) >= least}
