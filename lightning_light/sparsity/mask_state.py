"""Tensors that a masking callback keeps in the compression state, and how they follow a cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypedDict

from torch import Tensor, nn

from lightning_light.schema import LikeTensors
from lightning_light.surgery.edit import take
from lightning_light.validation import Fraction

__all__ = ["MaskState", "cut_masks"]


class MaskState(TypedDict, total=False):
    """What a masking callback keeps in the compression state.

    Attributes:
        masks: by weight name.
        per_weight: kind -> weight name -> tensor in the weight's shape.
        fraction: of the way to the budget that is completed.
    """

    masks: Annotated[dict[str, Tensor], LikeTensors("bool")]
    per_weight: dict[str, Annotated[dict[str, Tensor], LikeTensors()]]
    fraction: Fraction


def cut_masks(model: nn.Module, state: dict[str, Any], kept: Mapping[str, Mapping[int, Tensor]] | None) -> None:
    """Cut the masks of a method's state, and its tensors ``per_weight``, as ``model`` has been cut.

    Those of tensors that are gone, or have another shape, are dropped.

    Args:
        model: the module, changed.
        state: of one method.
        kept: tensor name -> dimension -> positions that stayed; None where modules were replaced.
    """
    shapes = {name: tensor.shape for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for entries in (state.get("masks", {}), *state.get("per_weight", {}).values()):
        for name in list(entries):
            dims = {dim: positions.long() for dim, positions in (kept or {}).get(name, {}).items()}
            entry = take(entries.pop(name), dims)
            if shapes.get(name) == entry.shape:
                entries[name] = entry
