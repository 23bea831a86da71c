"""Try a coupling out: sizes that stand as literals in the user's ``forward`` show only when a channel is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_light.coupling.groups import ChannelGroup, Coupling, coupling_of
from lightning_light.coupling.trace import FORWARD_ERRORS, Tracer, leaf_tensors, quiet, trace
from lightning_light.surgery.edit import trial

__all__ = ["couple_channels"]


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
    attempt = _Attempt(model, args, kwargs or {}, tracer)
    if not attempt.broken(coupling):
        return coupling
    if _tie_to_width(tracer):
        coupling = coupling_of(model, tracer)
    for group, error in attempt.broken(coupling):
        tracer.book.protect(group.roots, f"a size is fixed in the code that reads it ({error})")
    return coupling_of(model, tracer)


class _Attempt:
    """One forward pass of the model, as it would be after a cut."""

    def __init__(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], tracer: Tracer) -> None:
        self._model, self._args, self._kwargs, self._tracer = model, args, kwargs, tracer

    def broken(self, coupling: Coupling) -> list[tuple[ChannelGroup, str]]:
        """Groups that cannot lose a channel, each with the error that tells why. One pass where all is well."""
        groups = [group for group in coupling.groups if group.reason is None and group.width > 1]
        without_one = {group.name: torch.arange(group.width) > 0 for group in groups}
        if self.failure(coupling, without_one) is None:
            return []
        tried = [(group, self.failure(coupling, {group.name: without_one[group.name]})) for group in groups]
        return [(group, error) for group, error in tried if error is not None]

    def failure(self, coupling: Coupling, kept: Mapping[str, Tensor]) -> str | None:
        """Why the pass fails after the cut ``kept``, or gives outputs of other shapes; None where it is fine."""
        positions, attributes = coupling.kept_positions(kept), coupling.attributes(self._model, kept)
        with quiet(self._model), trial(self._model, positions, attributes):
            try:
                out = self._model(*self._args, **self._kwargs)
            except FORWARD_ERRORS as error:
                return str(error).partition("\n")[0]
        found = [tuple(tensor.shape) for tensor in leaf_tensors(out)]
        expected = self._tracer.output_shapes
        return None if found == expected else f"the output's shape would change from {expected} to {found}"


def _tie_to_width(tracer: Tracer) -> bool:
    """``x.reshape(n, length, heads, width // heads)``: what is split inside is as wide as what comes in."""
    tied = False
    for split in tracer.splits:
        if split.width is not None and split.parts.numel() % split.width.numel() == 0:
            tracer.book.merge(split.parts.reshape(-1, split.width.numel()), split.width)
            tied = True
    return tied
