"""Store the example input in the compression state: a resumed run may need it before its first batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_light.capture import Capture, capture
from lightning_light.example_input import ExampleInput
from lightning_light.schema import damage
from lightning_light.surgery.manifest import plain_copy

__all__ = ["restore_or_capture_example", "store_example", "stored_calls"]

_KEY = "example"


def restore_or_capture_example(pl_module: nn.Module, state: dict[str, Any], module: nn.Module | None = None) -> Capture:
    """Capture an example input, or restore the one that was stored before the run was interrupted.

    Args:
        pl_module: the LightningModule.
        state: the method's state.
        module: the submodule whose call is captured, if not ``pl_module`` itself.

    Raises:
        ManifestError: what was stored is no call of the module.
    """
    found = capture(pl_module, module)
    if found.example is None and state.get(_KEY):
        found.remove()
        found.example = _restored(module or pl_module, state[_KEY])
    return found


def stored_calls(pl_module: nn.Module, state: Mapping[str, Any]) -> list[ExampleInput]:
    """Return the calls of ``pl_module`` that a state has under ``"inputs"``, on its device.

    Raises:
        ManifestError: what was stored is no call of the module.
    """
    return [_restored(pl_module, call).to(pl_module) for call in state.get("inputs", [])]


def _restored(module: nn.Module, stored: Mapping[str, Any]) -> ExampleInput:
    example = ExampleInput(**stored)
    try:
        inspect.signature(getattr(module, example.method)).bind(*example.args, **example.kwargs)
    except TypeError as error:
        raise damage("a stored input in the state of a method", f"a call of `{example.method}`", str(error)) from error
    return example


def store_example(state: dict[str, Any], found: Capture | None) -> None:
    """Store the example input in ``state``, if it is known and can be part of a weights-only checkpoint."""
    if _KEY in state or found is None or found.example is None:
        return
    try:
        state[_KEY] = plain_copy({"args": found.example.args, "kwargs": found.example.kwargs}, _KEY)
        if found.example.method != "forward":
            state[_KEY]["method"] = found.example.method
    except TypeError:  # it contains other objects
        state[_KEY] = {}
