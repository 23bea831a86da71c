"""Add the distillation losses to the loss that the patched ``training_step`` returns.

The losses are added inside autocast and before Lightning divides by the number of accumulated batches, bit for bit as
hand-written distillation does, also under DDP and with a gradient scaler. In manual optimization they are added in
``manual_backward``, before the loss is scaled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["add_to_loss"]


def add_to_loss(output: Any, extra: Tensor) -> Any:
    """Return what ``training_step`` returned, with ``extra`` added to its loss; a dict of the user's is not changed."""
    if isinstance(output, Mapping):
        return {**output, "loss": output["loss"] + extra}
    return output + extra
