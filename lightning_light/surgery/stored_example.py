"""How the network is called, remembered: a run that is resumed where something is due has seen no batch yet."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_light.example_input import Capture, ExampleInput, capture
from lightning_light.surgery.manifest import plain_copy

__all__ = ["restore_or_capture_example", "remember"]

_KEY = "example"


def restore_or_capture_example(pl_module: nn.Module, state: dict[str, Any]) -> Capture:
    """As `capture`; without an ``example_input_array`` the call that an earlier part of the run has remembered.

    Args:
        pl_module: the LightningModule.
        state: the method's part of the compression_state.
    """
    found = capture(pl_module)
    if found.example is None and state.get(_KEY):
        found.remove()
        found.example = ExampleInput(**state[_KEY])
    return found


def remember(state: dict[str, Any], found: Capture | None) -> None:
    """Put the call into ``state`` as soon as it is known; one that no weights-only checkpoint holds is waited for."""
    if _KEY in state or found is None or found.example is None:
        return
    try:
        state[_KEY] = plain_copy({"args": found.example.args, "kwargs": found.example.kwargs}, _KEY)
    except TypeError:  # it holds an object of the user's own
        state[_KEY] = {}
