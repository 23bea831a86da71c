"""Try a coupling out: sizes that stand as literals in the user's ``forward`` show only when a channel is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_light.coupling.groups import ChannelGroup, Coupling, coupling_of
from lightning_light.coupling.trace import FORWARD_ERRORS, Tracer, leaf_tensors, quiet, trace
from lightning_light.surgery.edit import trial

__all__ = ["couple_channels", "failure"]


def couple_channels(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, *, heads: str = "dim"
) -> Coupling:
    """Find every set of channels of ``model`` that hangs together, and try each one.

    One forward pass is traced; then one channel of each group is taken out, for a trial, and the forward pass must
    still give outputs of the same shape. A group that breaks it (a size is written down in the code) is first tied to
    the width of the module that it runs in, and protected where that does not help.

    Args:
        model: a module; afterwards it is exactly what it was.
        args: positional arguments of one call; two samples in the batch are enough.
        kwargs: keyword arguments of that call.
        heads: what leaves an attention: ``"dim"``, the same position of every head, or ``"head"``, whole heads.

    Raises:
        TraceError: the forward pass fails on the input given.
    """
    tracer = trace(model, args, kwargs, heads=heads)
    coupling = coupling_of(model, tracer)
    shapes = tracer.output_shapes
    if not _broken(model, coupling, args, kwargs, shapes):
        return coupling
    if _tie_to_width(tracer):
        coupling = coupling_of(model, tracer)
    for group, error in _broken(model, coupling, args, kwargs, shapes):
        tracer.book.protect(group.roots, f"a size is fixed in the code that reads it ({error})")
    return coupling_of(model, tracer)


def failure(
    model: nn.Module,
    coupling: Coupling,
    kept: Mapping[str, Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    shapes: Sequence[tuple[int, ...]],
) -> str | None:
    """Why ``model`` would fail, or not give outputs of ``shapes``, after the cut ``kept``; ``None`` where it would not."""
    with quiet(model), trial(model, coupling.kept_positions(kept), coupling.attributes(model, kept)):
        try:
            out = model(*args, **(kwargs or {}))
        except FORWARD_ERRORS as error:
            return str(error).partition("\n")[0]
    found = [tuple(tensor.shape) for tensor in leaf_tensors(out)]
    return None if found == list(shapes) else f"the output's shape would change from {list(shapes)} to {found}"


def _broken(
    model: nn.Module,
    coupling: Coupling,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    shapes: Sequence[tuple[int, ...]],
) -> list[tuple[ChannelGroup, str]]:
    """Groups that cannot lose a channel, each with the error that tells why. One pass where all is well."""
    groups = [group for group in coupling.groups if group.reason is None and group.width > 1]
    without_one = {group.name: torch.arange(group.width) > 0 for group in groups}
    if failure(model, coupling, without_one, args, kwargs, shapes) is None:
        return []
    tried = [(g, failure(model, coupling, {g.name: without_one[g.name]}, args, kwargs, shapes)) for g in groups]
    return [(group, error) for group, error in tried if error is not None]


def _tie_to_width(tracer: Tracer) -> bool:
    """``x.reshape(n, length, heads, width // heads)``: what is split inside is as wide as what comes in."""
    tied = False
    for split in tracer.splits:
        if split.width is not None and split.parts.numel() % split.width.numel() == 0:
            tracer.book.merge(split.parts.reshape(-1, split.width.numel()), split.width)
            tied = True
    return tied
