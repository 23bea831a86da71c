"""Register the operations of the edit log, and replay them on a structure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lightning_light.errors import ManifestError

Replay = Callable[[nn.Module, Mapping[str, Any]], None]

_OPERATIONS: dict[str, Replay] = {}


def register_operation(name: str) -> Callable[[Replay], Replay]:
    """Register how the operation ``name`` is replayed when a checkpoint is loaded.

    The decorated function gets a structure (`copy_structure`: parameters on ``meta``, shapes not yet those of the
    checkpoint) and the edit log's entry, and changes modules and attributes as the operation did. It reads attributes
    such as ``in_features``, not the shapes of tensors, which are taken from the state dict afterwards. It must not
    change an attribute in place: the structure shares them with the live module.

    Raises:
        ValueError: the name is taken by another function.

    Example:
        >>> @register_operation("doctest/double")
        ... def replay(model, entry):
        ...     model.get_submodule(entry["name"]).scale *= 2
    """

    def register(replay: Replay) -> Replay:
        taken = _OPERATIONS.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (replay.__module__, replay.__qualname__):
            raise ValueError(f"`register_operation({name!r})`: the name is taken by {taken.__module__}.")
        _OPERATIONS[name] = replay
        return replay

    return register


def is_registered(name: str) -> bool:
    """Whether an operation of this name can be replayed."""
    return name in _OPERATIONS


def replay_edits(structure: nn.Module, edit_log: list[dict[str, Any]]) -> nn.Module:
    """Apply the edit log to ``structure``, and return it.

    Raises:
        ManifestError: an operation is unknown, or does not fit the structure.
    """
    for place, entry in enumerate(edit_log):
        replay = _OPERATIONS.get(entry["op"])
        if replay is None:
            raise ManifestError(
                f"The checkpoint's edit log has an operation {entry['op']!r}, expected one of {sorted(_OPERATIONS)}. "
                "Import the module that registers it before loading."
            )
        try:
            with torch.random.fork_rng(devices=[]):  # a new layer draws initial weights, which are replaced
                replay(structure, entry)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise ManifestError(
                f"Entry {place} ({entry['op']!r}) of the checkpoint's edit log does not fit "
                f"`{type(structure).__name__}`: {type(error).__name__}: {error}."
            ) from error
    return structure


@register_operation("channels")
def replay_channels(model: nn.Module, entry: Mapping[str, Any]) -> None:
    """Set the attributes that count channels; the tensors follow the state dict."""
    for path, values in entry["attributes"].items():
        module = model.get_submodule(path)
        for name, value in values.items():
            old = getattr(module, name)  # a missing attribute is a damaged edit log
            setattr(module, name, tuple(value) if isinstance(value, list) and not isinstance(old, list) else value)
