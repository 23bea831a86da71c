"""Encode and decode the manifest of a checkpoint, in types that a weights-only load admits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch
from torch import Tensor, nn

from lightning_light.errors import ManifestError
from lightning_light.schema import Context, TensorOf, check_schema, damage
from lightning_light.surgery.distributed import digest
from lightning_light.surgery.ownership import Claim, PlainClaim
from lightning_light.validation import NonNegativeFloat, NonNegativeInt

KEY = "lightning_light"
"""Where in a checkpoint the manifest is."""

VERSION = 3

Entry = dict[str, Any]
Kept = dict[str, dict[int, Tensor]]
Shapes = dict[str, tuple[int, ...]]

_STATE_SCHEMAS: dict[str, Any] = {}


class _Encoded(TypedDict):
    """What a checkpoint holds; some parts as JSON."""

    version: int
    edit_log: str
    state: dict[str, dict[str | int, Any]]
    owners: dict[str, PlainClaim]
    references: dict[str, NonNegativeFloat]
    parameter_order: list[list[list[str | None]]]
    fingerprint: str
    buffers: dict[str, Tensor]
    kept: dict[str, dict[NonNegativeInt, Annotated[Tensor, TensorOf("integer", 1, 0)]]] | None
    digest: str


class _Parsed(TypedDict):
    """What the JSON parts hold."""

    edit_log: list[dict[str, Any]]
    fingerprint: dict[str, list[NonNegativeInt]]


def register_state(method: str, schema: Any) -> None:
    """Register the schema of a method's state, a `TypedDict`: it is checked whenever a manifest is read.

    Args:
        method: key of the method's state; it holds for a second callback's (``"#2"``) as well.
        schema: as in `check_schema`.
    """
    _STATE_SCHEMAS[method] = schema


@dataclass
class Manifest:
    """The manifest of one checkpoint.

    Attributes:
        edit_log: the structural operations, in order.
        state: what each method keeps, under its name.
        owners: method -> the layers that it works on.
        references: quantity -> its value before any method changed the network.
        parameter_order: names of the optimizers' parameters, for each optimizer and group.
        fingerprint: the parameters of the network before the first operation, and their shapes.
        buffers: buffers that no state dict has, and that the operations have changed.
        kept: which positions of the first network's tensors are left, or None if that is unknown.
    """

    edit_log: list[Entry] = field(default_factory=list)
    state: dict[str, dict[str, Any]] = field(default_factory=dict)
    owners: dict[str, Claim] = field(default_factory=dict)
    references: dict[str, float] = field(default_factory=dict)
    parameter_order: list[list[list[str | None]]] = field(default_factory=list)
    fingerprint: Shapes = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    kept: Kept | None = field(default_factory=dict)

    def encode(self) -> dict[str, Any]:
        """Return plain types and tensors only.

        Raises:
            TypeError: a method keeps something else in its state.
        """
        encoded = {
            "version": VERSION,
            "edit_log": json.dumps(self.edit_log),
            "state": plain_copy(self.state, "state"),
            "owners": {method: claim.encode() for method, claim in self.owners.items()},
            "references": dict(self.references),
            "parameter_order": self.parameter_order,
            "fingerprint": json.dumps(self.fingerprint),
            "buffers": dict(self.buffers),
            "kept": None if self.kept is None else {name: dict(dims) for name, dims in self.kept.items()},
        }
        return signed(encoded)

    @classmethod
    def decode(cls, encoded: object) -> Manifest:
        """Read what `encode` has written, and check every part of it.

        `check_states` compares the states of the methods with the network too.

        Raises:
            ManifestError: it is of another version, a part of it, which the message names, is not what `encode`
                writes, or it does not match its digest.
        """
        parsed = _checked(encoded)
        assert isinstance(encoded, dict)  # `_checked`
        return cls(
            edit_log=parsed["edit_log"],
            state=plain_copy(encoded["state"], "state"),
            owners={method: Claim.decode(method, claim) for method, claim in encoded["owners"].items()},
            references={name: float(value) for name, value in encoded["references"].items()},
            parameter_order=encoded["parameter_order"],
            fingerprint={name: tuple(shape) for name, shape in parsed["fingerprint"].items()},
            buffers=dict(encoded["buffers"]),
            kept=None if encoded["kept"] is None else {name: dict(dims) for name, dims in encoded["kept"].items()},
        )


def _checked(encoded: object) -> _Parsed:
    """Check all parts of an encoded manifest; return those that are JSON, parsed."""
    if not isinstance(encoded, dict) or type(encoded.get("version")) is not int:
        raise ManifestError(f"Expected a manifest under the checkpoint's key '{KEY}', found {_brief(encoded)}.")
    if encoded["version"] != VERSION:
        mend = "Update lightning_light" if encoded["version"] > VERSION else "Load it with the release that wrote it"
        raise ManifestError(
            f"The checkpoint's manifest has version {encoded['version']}, this release of lightning_light reads "
            f"version {VERSION}. {mend}."
        )
    try:
        plain_copy(encoded, "manifest")
    except TypeError as error:
        raise ManifestError(f"The checkpoint's manifest is damaged: {error}") from error
    check_schema(encoded, _Encoded, "manifest")
    parsed: _Parsed = {"edit_log": _parse(encoded, "edit_log"), "fingerprint": _parse(encoded, "fingerprint")}
    check_schema(parsed, _Parsed, "manifest")
    for place, entry in enumerate(parsed["edit_log"]):
        check_schema(entry.get("op"), str, f"manifest['edit_log'][{place}]['op']")
    check_states(encoded["state"], Context())
    if signed(encoded)["digest"] != encoded["digest"]:
        raise ManifestError(
            "The checkpoint's manifest is damaged: expected it to match its digest, found that it has changed since it "
            "was written. Use another checkpoint of the run."
        )
    return parsed


def signed(encoded: Mapping[str, Any]) -> dict[str, Any]:
    """Return an encoded manifest with the digest of its other parts."""
    parts = {key: value for key, value in encoded.items() if key != "digest"}
    return {**parts, "digest": digest(parts)}


def check_states(states: Mapping[str, Any], context: Context) -> None:
    """Check the states of all methods by their schemas.

    Args:
        states: method -> its state.
        context: the network that the states belong to.

    Raises:
        ManifestError: names the part that is not sound.
    """
    for method, state in states.items():
        schema = _STATE_SCHEMAS.get(method.partition("#")[0], Any)
        check_schema(state, schema, f"manifest['state'][{method!r}]", context)


@contextmanager
def naming_file(path: str | Path | None) -> Iterator[None]:
    """Name the file in a `ManifestError` that is raised inside."""
    try:
        yield
    except ManifestError as error:
        if path is not None:
            error.args = (f"`{path}`: {error}",)
        raise


def _parse(encoded: dict[str, Any], part: str) -> Any:
    try:
        return json.loads(encoded[part])
    except ValueError as error:
        raise damage(f"manifest[{part!r}]", "JSON", f"text that does not parse ({error})") from error


def plain_copy(value: Any, path: str) -> Any:
    """Copy the containers, keep the tensors; refuse what a weights-only load would refuse.

    Raises:
        TypeError: ``value`` holds another type; the message names the place.
    """
    dense = isinstance(value, Tensor) and value.layout is torch.strided and value.device.type != "meta"
    if dense or value is None or type(value) in (int, float, bool, str):
        return value
    if type(value) is dict:
        return {_plain_key(key, path): plain_copy(item, f"{path}[{key!r}]") for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain_copy(item, f"{path}[{place}]") for place, item in enumerate(value))
    raise TypeError(
        f"`{path}`: expected int, float, bool, str, None, list, tuple, dict or a dense tensor, which `torch.load("
        f"weights_only=True)` admits, found {type(value).__name__}."
    )


def _plain_key(key: Any, path: str) -> Any:
    if type(key) in (int, str):
        return key
    raise TypeError(f"`{path}`: expected keys of type int or str, found {type(key).__name__}.")


def fingerprint_of(model: nn.Module, leave_out: str) -> Shapes:
    """Return names and shapes of the parameters, without children whose names begin with ``leave_out``."""
    return {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if not name.startswith(leave_out) and not nn.parameter.is_lazy(parameter)
    }


def check_fingerprint(model: nn.Module, found: Shapes, leave_out: str) -> None:
    """Refuse a checkpoint of a network that was different before compression.

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
    """Convert positions to a type that takes half the space of an index."""
    return positions.detach().cpu().to(torch.int32)
