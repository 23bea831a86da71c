"""Patch ``training_step`` and ``manual_backward`` on the instance, to add the distillation losses to the task's loss.

The losses are added inside autocast and before Lightning divides by the number of accumulated batches, bit for bit as
hand-written distillation does, also under DDP and with a gradient scaler. In manual optimization they are added in
``manual_backward``, before the loss is scaled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

__all__ = ["Wrapping", "add_to_loss"]


class Wrapping:
    """One method of an instance, wrapped; `undo` also when somebody else has wrapped it since.

    Args:
        owner: the instance.
        name: of the method.
        around: the method, and its arguments -> what is returned in its place.
    """

    def __init__(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        original = getattr(owner, name)
        had = vars(owner).get(name)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs) if self._active else original(*args, **kwargs)

        self._owner, self._name, self._active = owner, name, True
        wrapper._undone = lambda: (not self._active, had)  # type: ignore[attr-defined]
        setattr(owner, name, wrapper)

    def undo(self) -> None:
        """Take the wrapper away, and every one below it that is done too; or leave it, passing through."""
        self._active = False
        current = vars(self._owner).get(self._name)
        while current is not None and hasattr(current, "_undone"):
            done, had = current._undone()
            if not done:
                return
            if had is None:
                vars(self._owner).pop(self._name)
            else:
                vars(self._owner)[self._name] = had
            current = had


def add_to_loss(output: Any, extra: Tensor) -> Any:
    """Return what ``training_step`` returned, with ``extra`` added to its loss; a dict of the user's is not changed."""
    if isinstance(output, Mapping):
        return {**output, "loss": output["loss"] + extra}
    return output + extra
