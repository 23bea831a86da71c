"""Layers belong to methods: surgery refuses a change that a later method's layers cannot follow, and says the order."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_light.errors import UnsupportedError
from lightning_light.order import Stage
from lightning_light.surgery.attachment import attach, check_owners, has_state, release, state_of
from lightning_light.surgery.edit import cut
from lightning_light.surgery.manifest import KEY
from lightning_light.surgery.replace import replace_modules


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


FEWER = torch.tensor([0, 2, 5])
KEPT = {"0.weight": {0: FEWER}, "0.bias": {0: FEWER}, "2.weight": {1: FEWER}}


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("stage", [Stage.MASKS, Stage.FACTORS, Stage.QUANTIZATION])
@pytest.mark.parametrize("layer", ["0", "2", ""])
def test_a_cut_of_a_later_methods_layer_is_refused(net: nn.Sequential, stage: Stage, layer: str) -> None:
    attach(net).claim(net, "later", stage, [layer])
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(UnsupportedError, match=r"`structured_pruning` on `.`: .* `later` owns .*Use `structured_pruni"):
        cut(net, KEPT)
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_layer_that_a_cut_does_not_touch_may_belong_to_anybody(net: nn.Sequential) -> None:
    net.append(nn.Linear(3, 3))
    attach(net).claim(net, "quantization", Stage.QUANTIZATION, ["3"])
    cut(net, KEPT)
    assert net[0].out_features == len(FEWER)


@pytest.mark.parametrize("stage", [Stage.STRUCTURED, Stage.MASKS])
def test_what_follows_cuts_is_cut(net: nn.Sequential, stage: Stage) -> None:
    attach(net).claim(net, "follower", stage, ["0", "2"], follows_cuts=True)
    cut(net, KEPT)
    assert shapes(net)["2.weight"] == (3, 3)


def test_a_method_may_change_its_own_layers(net: nn.Sequential) -> None:
    attach(net).claim(net, "pruning#2", Stage.QUANTIZATION, ["0", "2"])
    cut(net, KEPT, method="pruning", stage=Stage.QUANTIZATION)
    assert net[0].out_features == len(FEWER)


def test_a_later_method_may_change_an_earlier_ones_layers(net: nn.Sequential) -> None:
    attach(net).claim(net, "weight_pruning", Stage.MASKS, ["0"], follows_cuts=True)
    replace_modules(net, {"0": nn.Linear(4, 6)}, stage=Stage.FACTORS)
    with pytest.raises(UnsupportedError, match="`weight_pruning` owns"):
        replace_modules(net, {"0": nn.Linear(4, 6)}, stage=Stage.STRUCTURED)


@pytest.mark.parametrize("claimed", ["block", "block.0", ""])
@pytest.mark.parametrize("replaced", ["block", "block.0"])
def test_a_replacement_is_refused_inside_and_around_a_claim(claimed: str, replaced: str) -> None:
    net = nn.Sequential()
    net.block = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = net.get_submodule(replaced)
    attach(net).claim(net, "clustering", Stage.FACTORS, [claimed], follows_cuts=True)
    with pytest.raises(UnsupportedError, match=r"`factors` on .*`clustering` owns.*one of the two"):
        replace_modules(net, {replaced: nn.Identity()}, method="factors", stage=Stage.FACTORS)
    assert net.get_submodule(replaced) is before
    replace_modules(net, {"block.1": nn.Identity()}, method="clustering")


def test_shared_layers_and_tensors_are_found_under_all_their_names(net: nn.Sequential) -> None:
    net.append(net[0])
    net.append(nn.Linear(4, 6))
    net[4].weight = net[0].weight
    attach(net).claim(net, "quantization", Stage.QUANTIZATION, ["4"])
    with pytest.raises(UnsupportedError, match="on `4`"):
        cut(net, {"0.weight": {0: FEWER}})
    state_of(net).claim(net, "quantization", Stage.QUANTIZATION, ["3"])
    assert [claim.method for claim in state_of(net).owners(net, "0")] == ["quantization"]
    with pytest.raises(UnsupportedError):
        replace_modules(net, {"0": nn.Identity()})
    with pytest.raises(UnsupportedError, match="`quantization` owns"):
        state_of(net).claim(net, "weight_pruning", Stage.MASKS, ["0"])
    with pytest.raises(UnsupportedError, match="`quantization` owns"):
        check_owners(net, ["0"], method="any", stage=Stage.STRUCTURED)


def test_a_claim_is_refused_where_a_later_method_owns_the_layer(net: nn.Sequential) -> None:
    state = attach(net)
    state.claim(net, "quantization", Stage.QUANTIZATION, ["0"])
    with pytest.raises(UnsupportedError, match=r"`weight_pruning` on `0`.*Use `weight_pruning` first"):
        state.claim(net, "weight_pruning", Stage.MASKS, ["0", "2"])
    assert "weight_pruning" not in state.claims
    state.claim(net, "weight_pruning", Stage.MASKS, ["2"])
    state.disclaim("quantization")
    state.claim(net, "weight_pruning", Stage.MASKS, ["0", "2"])
    assert [claim.layers for claim in state.owners(net, "0")] == [("0", "2")]


def test_a_part_that_was_compressed_alone_keeps_its_claims_inside_a_whole(net: nn.Sequential) -> None:
    whole = nn.Sequential(nn.Identity(), net)
    attach(net).claim(net, "quantization", Stage.QUANTIZATION, ["0"])
    release(net)
    with pytest.raises(UnsupportedError, match="on `0`"):
        cut(whole, {f"1.{name}": dims for name, dims in KEPT.items()})
    with pytest.raises(UnsupportedError):
        replace_modules(whole, {"1": nn.Identity()}, stage=Stage.FACTORS)
    check_owners(whole, ["0"], method="any", stage=Stage.STRUCTURED)


def test_claims_and_references_travel_in_checkpoints_and_copies(net: nn.Sequential, tmp_path: Any) -> None:
    state = attach(net)
    state.claim(net, "quantization", Stage.QUANTIZATION, ["0"])
    assert state.reference("macs", lambda: 48.0) == 48.0
    torch.save({KEY: state.manifest(net), "state_dict": net.state_dict()}, tmp_path / "net.ckpt")
    loaded = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    attach(loaded).load(loaded, torch.load(tmp_path / "net.ckpt", weights_only=True))
    for other in (loaded, copy.deepcopy(net)):
        assert state_of(other).claims == state.claims
        assert state_of(other).references == {"macs": 48.0}
        with pytest.raises(UnsupportedError):
            cut(other, KEPT)
    copied = state.averaged_copy()
    copied.disclaim("quantization")
    assert "quantization" in state.claims


def test_a_checkpoint_without_claims_takes_them_back(net: nn.Sequential) -> None:
    attach(net)
    checkpoint = {KEY: state_of(net).manifest(net), "state_dict": net.state_dict()}
    state_of(net).claim(net, "quantization", Stage.QUANTIZATION, ["0"])
    state_of(net).load(net, checkpoint)
    cut(net, KEPT)


def test_a_reference_is_measured_once_for_each_quantity(net: nn.Sequential) -> None:
    state, measured = attach(net), []

    def measure() -> float:
        measured.append(sum(parameter.numel() for parameter in net.parameters()))
        return float(measured[-1])

    dense = state.reference("params", measure)
    cut(net, KEPT)
    assert state.reference("params", measure) == dense == measured[0]
    assert len(measured) == 1
    assert state.reference("params", measure, scope="0") < dense


def test_looking_attaches_nothing(net: nn.Sequential) -> None:
    cut(net, KEPT)
    check_owners(net, ["0"], method="any", stage=Stage.STRUCTURED)
    assert not has_state(net)
