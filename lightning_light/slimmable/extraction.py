"""Take the network of one width out of a network that `SlimmableTraining` has trained."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from lightning_light.copies import copy_network
from lightning_light.slimmable.plan import METHOD, STAGE
from lightning_light.surgery.attachment import attach, release, state_of
from lightning_light.surgery.edit import cut
from lightning_light.validation import OpenFraction, validated

__all__ = ["extract_width"]

Module = TypeVar("Module", bound=nn.Module)


@validated
def extract_width(module: Module, width: OpenFraction) -> Module:
    """Return a copy of ``module`` with the channels and the batch-norm statistics of ``width`` alone.

    It computes what the trained network computes at this width. Its checkpoints, files and further compression are
    those of a network with removed channels.

    Args:
        module: what `SlimmableTraining` has trained, or `lightning_light.load_from_checkpoint` has loaded; unchanged.
        width: one of the trained widths.

    Raises:
        ValueError: the module, or the width, was not trained so.
        UnsupportedError: a layer was changed by a later method, for instance quantized.
    """
    state = state_of(module).state.get(METHOD, {})
    known = [1.0, *state["widths"]] if "widths" in state else []
    if width not in known:
        raise ValueError(
            f"`extract_width({type(module).__name__}(...), {width})`: expected a width that `SlimmableTraining` has "
            f"trained, found {f'the widths {known}' if known else 'none in this module'}. Give the LightningModule "
            "that was trained, or load it by `lightning_light.load_from_checkpoint`."
        )
    small = copy_network(module)
    compression_state = attach(small)
    if width < 1.0:
        network = state["networks"][state["widths"].index(width)]
        edit = cut(small, network["kept"], attributes=network["attributes"], method=METHOD, stage=STAGE)
        buffers = dict(small.named_buffers())
        for name, value in network["statistics"].items():
            buffers[name].copy_(value)
        compression_state.record(edit.entry(), kept=edit.kept)
    compression_state.state.pop(METHOD)
    compression_state.disclaim(METHOD)
    release(small)
    return small
