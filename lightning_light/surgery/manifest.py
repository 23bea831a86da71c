"""What a checkpoint says about the structure of its network, in types that a weights-only load admits."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_light.errors import ManifestError

KEY = "lightning_light"
"""Where in a checkpoint the manifest is."""

VERSION = 1

Entry = dict[str, Any]
Kept = dict[str, dict[int, Tensor]]
Shapes = dict[str, tuple[int, ...]]


@dataclass
class Manifest:
    """The manifest of one checkpoint.

    Attributes:
        edit_log: the structural operations, in order.
        state: what each method remembers, under its name.
        parameter_order: names of the optimizers' parameters, for each optimizer and group.
        fingerprint: the parameters of the network before the first operation, and their shapes.
        buffers: buffers that no state dict has, and that the operations have changed.
        kept: which positions of the first network's tensors are left, or None if that is unknown.
    """

    edit_log: list[Entry] = field(default_factory=list)
    state: dict[str, dict[str, Any]] = field(default_factory=dict)
    parameter_order: list[list[list[str | None]]] = field(default_factory=list)
    fingerprint: Shapes = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    kept: Kept | None = field(default_factory=dict)

    def encode(self) -> dict[str, Any]:
        """Plain types and tensors only.

        Raises:
            TypeError: a method keeps something else in its state.
        """
        return {
            "version": VERSION,
            "edit_log": json.dumps(self.edit_log),
            "state": plain_copy(self.state, "state"),
            "parameter_order": self.parameter_order,
            "fingerprint": json.dumps(self.fingerprint),
            "buffers": dict(self.buffers),
            "kept": None if self.kept is None else {name: dict(dims) for name, dims in self.kept.items()},
        }

    @classmethod
    def decode(cls, encoded: object) -> Manifest:
        """Read what `encode` wrote.

        Raises:
            ManifestError: it is not what `encode` writes, or a newer version's.
        """
        if not isinstance(encoded, dict) or not isinstance(encoded.get("version"), int):
            raise ManifestError(f"Expected a manifest under the checkpoint's key '{KEY}', found {_brief(encoded)}.")
        if encoded["version"] > VERSION:
            raise ManifestError(
                f"The checkpoint's manifest has version {encoded['version']}, this package reads up to {VERSION}. "
                "Update lightning_light."
            )
        try:
            manifest = cls(
                edit_log=json.loads(encoded["edit_log"]),
                state=plain_copy(encoded["state"], "state"),
                parameter_order=encoded["parameter_order"],
                fingerprint={name: tuple(shape) for name, shape in json.loads(encoded["fingerprint"]).items()},
                buffers=dict(encoded["buffers"]),
                kept=None if encoded["kept"] is None else {name: dict(dims) for name, dims in encoded["kept"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ManifestError(f"The checkpoint's manifest is damaged: {type(error).__name__}: {error}.") from error
        manifest._check()
        return manifest

    def _check(self) -> None:
        sound = {
            "edit_log": isinstance(self.edit_log, list)
            and all(isinstance(entry, dict) and isinstance(entry.get("op"), str) for entry in self.edit_log),
            "state": isinstance(self.state, dict) and all(isinstance(value, dict) for value in self.state.values()),
            "parameter_order": isinstance(self.parameter_order, list)
            and all(isinstance(group, list) for groups in self.parameter_order for group in groups),
            "buffers": all(isinstance(value, Tensor) for value in self.buffers.values()),
        }
        damaged = [name for name, good in sound.items() if not good]
        if damaged:
            raise ManifestError(f"The checkpoint's manifest is damaged: {', '.join(damaged)} of the wrong type.")


def plain_copy(value: Any, path: str) -> Any:
    """The same containers anew, the same tensors; nothing that a weights-only load would refuse.

    Raises:
        TypeError: ``value`` holds another type. Says where.
    """
    if value is None or type(value) in (int, float, bool, str) or isinstance(value, Tensor):
        return value
    if type(value) is dict:
        return {_plain_key(key, path): plain_copy(item, f"{path}[{key!r}]") for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain_copy(item, f"{path}[{place}]") for place, item in enumerate(value))
    raise TypeError(
        f"`{path}`: expected int, float, bool, str, None, list, tuple, dict or a tensor, which `torch.load("
        f"weights_only=True)` admits, found {type(value).__name__}."
    )


def _plain_key(key: Any, path: str) -> Any:
    if type(key) in (int, str):
        return key
    raise TypeError(f"`{path}`: expected keys of type int or str, found {type(key).__name__}.")


def fingerprint_of(model: nn.Module, leave_out: str) -> Shapes:
    """Names and shapes of the parameters, but for those of children whose names begin with ``leave_out``."""
    return {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if not name.startswith(leave_out) and not nn.parameter.is_lazy(parameter)
    }


def check_fingerprint(model: nn.Module, found: Shapes, leave_out: str) -> None:
    """Refuse the checkpoint of a network that was another one from the start.

    Args:
        model: the live network as it was before any operation.
        found: names and shapes of the parameters of the network that the checkpoint is of.
        leave_out: as in `fingerprint_of`.

    Raises:
        ManifestError: names or shapes differ; where ``model`` has no shape yet, any will do.
    """
    expected = fingerprint_of(model, leave_out)
    open_ = {name for name, parameter in model.named_parameters() if nn.parameter.is_lazy(parameter)}
    different = sorted(name for name in {*expected, *found} - open_ if expected.get(name) != found.get(name))
    if different:
        examples = "; ".join(f"{name}: {expected.get(name)}, {found.get(name)}" for name in different[:3])
        raise ManifestError(
            f"The checkpoint is of another network than this `{type(model).__name__}`: before compression "
            f"{len(different)} parameters differ (name: expected, found): {examples}. Build the module with the "
            "arguments that the checkpoint's run used."
        )


def _brief(value: object) -> str:
    if isinstance(value, dict):
        return f"a dict with {sorted(map(str, value))[:8]}"
    return type(value).__name__


def half_size(positions: Tensor) -> Tensor:
    """Positions in a type that takes half the space of an index."""
    return positions.detach().cpu().to(torch.int32)
