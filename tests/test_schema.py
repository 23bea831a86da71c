"""A manifest is checked whole when it is read: the error names the damaged part, and nothing is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, ClassVar, Literal, TypedDict

import pytest
import torch
from torch import Tensor, nn

from lightning_light.callback import CompressionCallback
from lightning_light.errors import ManifestError
from lightning_light.order import Stage
from lightning_light.schema import check_schema
from lightning_light.surgery.attachment import attach
from lightning_light.surgery.manifest import KEY, Manifest


class Inner(TypedDict):
    """A dict with a key that must be there."""

    total: Tensor


class MethodState(TypedDict, total=False):
    """The state of the method below."""

    events: int
    masks: dict[str, Tensor]
    mode: Literal["soft", "hard"]
    sums: dict[str, Inner]
    pairs: list[tuple[int, float]]
    last: float | None


class Method(CompressionCallback):
    """A method whose state has a schema."""

    method: ClassVar[str] = "schema_test"
    stage: ClassVar[int] = Stage.MONITORS
    state_schema: ClassVar[Any] = MethodState


STATE = {
    "events": 2,
    "masks": {"weight": torch.ones(2, 2, dtype=torch.bool)},
    "mode": "soft",
    "sums": {"0": {"total": torch.zeros(())}},
    "pairs": [(1, 0.5), (2, 1)],
    "last": None,
}


def manifest() -> dict[str, Any]:
    net = nn.Linear(2, 2)
    state = attach(net)
    state.record({"op": "channels", "attributes": {"": {"out_features": 2}}}, kept={"weight": {0: torch.arange(2)}})
    state.claim(net, "method", Stage.MASKS, ["a", "b"])
    state.references["macs"] = 4.0
    state.state = {"schema_test": dict(STATE), "schema_test#2": {"events": 1}, "unknown": {"anything": [1, {}]}}
    encoded: dict[str, Any] = state.manifest(net, [torch.optim.SGD(net.parameters(), lr=0.1)])
    return encoded


def method_state(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda encoded: encoded["state"]["schema_test"].update(changes)


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "manifest['state']['schema_test']['events']": method_state(events="2"),
    "manifest['state']['schema_test']['masks']['weight']": method_state(masks={"weight": [1, 0]}),
    "manifest['state']['schema_test']['mode']": method_state(mode="loud"),
    "manifest['state']['schema_test']['sums']['0']": method_state(sums={"0": {}}),
    "manifest['state']['schema_test']['pairs'][1][0]": method_state(pairs=[(1, 0.5), (True, 1.0)]),
    "manifest['state']['schema_test']['pairs'][0]": method_state(pairs=[(1, 0.5, 3.0)]),
    "manifest['state']['schema_test']['last']": method_state(last="now"),
    "manifest['state']['schema_test']": method_state(evnts=2),
    "manifest['state']['schema_test#2']['events']": lambda e: e["state"]["schema_test#2"].update(events=None),
    "manifest['state']": lambda e: e.update(state=[]),
    "manifest['state']['unknown']['anything']": lambda e: e["state"]["unknown"].update(anything={1, 2}),
    "manifest['owners']['method']['layers'][0]": lambda e: e["owners"]["method"].update(layers=[1]),
    "manifest['owners']['method']": lambda e: e["owners"]["method"].pop("stage"),
    "manifest['references']['macs']": lambda e: e["references"].update(macs="many"),
    "manifest['parameter_order'][0][0][0]": lambda e: e["parameter_order"][0][0].__setitem__(0, 3),
    "manifest['fingerprint']['weight'][0]": lambda e: e.update(fingerprint=json.dumps({"weight": ["2"]})),
    "manifest['fingerprint']": lambda e: e.update(fingerprint="{"),
    "manifest['edit_log'][0]['op']": lambda e: e.update(edit_log=json.dumps([{"attributes": {}}])),
    "manifest['edit_log'][0]": lambda e: e.update(edit_log=json.dumps(["channels"])),
    "manifest['buffers']['mean']": lambda e: e["buffers"].update(mean=0.0),
    "manifest['kept']['weight'], key 'x'": lambda e: e["kept"]["weight"].update(x=torch.arange(2)),
    "manifest['kept']['weight'][0]": lambda e: e["kept"]["weight"].update({0: [0, 1]}),
    "manifest": lambda e: e.pop("references"),
}


def test_a_sound_manifest_is_read_as_it_was_written() -> None:
    encoded = manifest()
    assert Manifest.decode(encoded).encode() == encoded | {"kept": encoded["kept"]}


@pytest.mark.parametrize("part", DAMAGES)
def test_the_damaged_part_is_named(part: str) -> None:
    encoded = manifest()
    DAMAGES[part](encoded)
    net = nn.Linear(2, 2)
    state = attach(net)
    with pytest.raises(ManifestError) as caught:
        state.load(net, {KEY: encoded, "state_dict": net.state_dict()})
    assert f"`{part}`" in str(caught.value)
    assert not state.edit_log
    assert not state.state
    assert not state.claims


@pytest.mark.parametrize(("version", "sentence"), [(1, "the release that wrote it"), (99, "Update lightning_light")])
def test_other_versions_are_refused(version: int, sentence: str) -> None:
    with pytest.raises(ManifestError, match=sentence):
        Manifest.decode(manifest() | {"version": version})


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (1, int),
        (1, float),
        (None, int | None),
        ("a", Literal["a", "b"]),
        ((1, 2), tuple[int, ...]),
        ({"a": [torch.zeros(1)]}, dict[str, list[Tensor]]),
        (object(), Any),
    ],
)
def test_what_fits_is_admitted(value: Any, annotation: Any) -> None:
    check_schema(value, annotation, "value")


@pytest.mark.parametrize(
    ("value", "annotation"),
    [(True, int), (1.0, int), (False, float), ("1", int), ([1], tuple[int, ...]), (1, dict[str, int])],
)
def test_what_does_not_fit_is_refused(value: Any, annotation: Any) -> None:
    with pytest.raises(ManifestError, match="at `value`: expected"):
        check_schema(value, annotation, "value")
