"""A structure is copied without weights, and a live network follows another one without losing its objects."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_light.host.patches import wrap_method
from lightning_light.surgery.attachment import attach, release, state_of
from lightning_light.surgery.data import set_data
from lightning_light.surgery.edit import cut
from lightning_light.surgery.manifest import Manifest
from lightning_light.surgery.structure import PRIVATE_PREFIX, apply_structure, compare, copy_structure
from tests.surgery.runs import Lit, halve, same, two_factors
from tests.zoo import ZOO, noise


class Odd(nn.Module):
    """A tied weight, a shared layer, a buffer that no state dict has, an attribute that cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.again = self.first
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0, 4.0]), persistent=False)
        self.register_buffer("count", torch.zeros(4))
        self.lock = iter([1])
        self.first.weight.note = "the user's"

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.second(self.first(x))) * self.scale


def test_a_structure_has_no_weights_and_the_same_ties() -> None:
    model = Odd()
    copied = copy_structure(model)
    assert type(copied) is Odd
    assert copied.first is copied.again
    assert copied.first is not model.first
    assert copied.first.weight is copied.second.weight
    assert {tensor.device.type for tensor in copied.state_dict().values()} == {"meta"}
    assert copied.scale.tolist() == [1, 2, 3, 4]
    assert copied.lock is model.lock
    assert copied.first.weight.note == "the user's"


@pytest.mark.parametrize("name", ZOO)
def test_every_net_of_the_zoo_has_a_structure_equal_to_itself(name) -> None:
    net = ZOO[name]()
    objects = [id(thing) for thing in (*net.modules(), *net.parameters(), *net.buffers())]
    before = copy.deepcopy(net.state_dict())
    current, target = copy_structure(net), copy_structure(net)
    assert not compare(current, target).attributes
    assert not compare(current, target).replaced
    apply_structure(net, current, target)
    assert [id(thing) for thing in (*net.modules(), *net.parameters(), *net.buffers())] == objects
    assert same(dict(before), dict(net.state_dict()))


def test_ties_and_non_persistent_buffers_are_restored() -> None:
    model = Odd()
    pristine = copy_structure(model)
    changed = copy_structure(pristine)
    changed.second = two_factors(changed.second, 2)
    apply_structure(model, copy_structure(pristine), changed)
    assert isinstance(model.second, nn.Sequential)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert [name for name, _ in model.named_children()] == ["first", "second"]
    first = model.first
    set_data(model.scale, torch.zeros(2))
    again = copy_structure(pristine)
    again.second = two_factors(again.second, 2)
    apply_structure(model, again, copy_structure(pristine))
    assert model.first is first is model.again
    assert model.second.weight is first.weight
    assert model.scale.tolist() == [1, 2, 3, 4]
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert model.load_state_dict(Odd().state_dict())


def test_additions_of_the_user_are_kept() -> None:
    model = Odd()
    pristine = copy_structure(model)
    model.register_buffer("mine", torch.ones(1))
    model.head = nn.Linear(4, 1)
    parametrizations.weight_norm(model.first)
    target = copy_structure(pristine)
    target.second = two_factors(target.second, 2)
    apply_structure(model, copy_structure(pristine), target)
    assert isinstance(model.second, nn.Sequential)
    assert model.mine.item() == 1
    assert model.head(model(noise(2, 4))).shape == (2, 1)
    assert "weight" not in model.first._parameters


def test_private_children_are_not_part_of_the_structure() -> None:
    module = Lit()
    module.add_module(f"{PRIVATE_PREFIX}_projector", nn.Linear(2, 2))
    compression_state = attach(module)
    manifest = Manifest.decode(compression_state.manifest(module))
    assert not any(name.startswith(PRIVATE_PREFIX) for name in manifest.fingerprint)
    checkpoint: dict[str, Any]
    cut(module, halve(module, "net.conv1", "net.bn1", "net.conv2"))
    compression_state.record({"op": "channels", "attributes": {"net.conv1": {"out_channels": 4}}})
    module.on_save_checkpoint(checkpoint := {"state_dict": module.state_dict()})
    plain = Lit()
    attach(plain).load(plain, checkpoint)
    assert plain.net.conv1.out_channels == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_new_tensors_are_of_the_networks_type(dtype) -> None:
    model = Odd()
    pristine = copy_structure(model)
    model.to(dtype)
    target = copy_structure(pristine)
    target.second = two_factors(target.second, 2)
    apply_structure(model, copy_structure(pristine), target)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_non_persistent_buffers_that_were_cut_are_in_the_manifest() -> None:
    class Scaled(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.arange(5.0), persistent=False)

    module = Scaled()
    compression_state = attach(module)
    names = ("scale", "net.fc.weight", "net.fc.bias")
    edit = cut(module, {name: {0: torch.tensor([1, 3])} for name in names})
    compression_state.record(edit.entry(), kept=edit.kept)
    module.on_save_checkpoint(checkpoint := {"state_dict": module.state_dict()})
    fresh = Scaled()
    attach(fresh).load(fresh, checkpoint)
    assert fresh.scale.tolist() == [1, 3]
    fresh.on_load_checkpoint({"state_dict": Scaled().state_dict()})
    assert fresh.scale.tolist() == [0, 1, 2, 3, 4]


def test_lazy_layers_are_copied_as_they_are() -> None:
    class Lazy(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.net.fc = nn.LazyLinear(5)

    module = Lazy()
    compression_state = attach(module)
    assert "net.fc.weight" not in Manifest.decode(compression_state.manifest(module)).fingerprint
    module(noise(2, 3, 8, 8))
    assert Manifest.decode(compression_state.manifest(module)).fingerprint["net.fc.weight"] == (5, 12)
    release(module)


def test_reading_a_compression_state_changes_nothing() -> None:
    module = Lit()
    before = dict(vars(module))
    assert state_of(module).edit_log == []
    assert vars(module) == before
    compression_state = attach(module)
    assert state_of(module) is compression_state is attach(module)
    release(module)
    release(module)
    assert not module._load_state_dict_pre_hooks
    assert state_of(module) is compression_state


def test_only_operations_that_can_be_replayed_are_recorded() -> None:
    compression_state = attach(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="name of a registered operation"):
        compression_state.record({"op": "unheard of"})
    with pytest.raises(TypeError, match="JSON serializable"):
        compression_state.record({"op": "channels", "attributes": {"": {"x": torch.ones(1)}}})


def test_consecutive_cuts_are_one_entry_and_compose() -> None:
    module = Lit()
    compression_state = attach(module)
    order = []
    for _ in range(2):
        stay = halve(module, "net.conv1", "net.bn1", "net.conv2")
        order.append(stay["net.conv1.weight"][0])
        edit = cut(module, stay)
        compression_state.record(edit.entry(), kept=edit.kept)
    assert len(compression_state.edit_log) == 1
    assert compression_state.edit_log[0]["attributes"]["net.conv1"]["out_channels"] == 2
    assert compression_state.kept is not None
    assert compression_state.kept["net.conv1.weight"][0].tolist() == order[0][order[1]].tolist()


def test_data_of_another_shape_survives_a_live_graph() -> None:
    weight = nn.Parameter(torch.ones(4, 3, dtype=torch.float64))
    graph = (weight * 2).sum()  # holds the accumulator that remembers (4, 3)
    set_data(weight, weight.data[:2].clone())
    (weight * 3).sum().backward()
    assert weight.grad is not None
    assert weight.grad.shape == (2, 3)
    assert graph.item() == 24


@pytest.mark.parametrize("made_first", [True, False])
def test_lazy_layers_are_loaded_before_they_have_a_shape(made_first) -> None:
    class Lazy(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.net.fc = nn.LazyLinear(5)

    module = Lazy()
    module(noise(2, 3, 8, 8))
    compression_state = attach(module)
    stay = torch.tensor([0, 2])
    kept = {"net.conv2.weight": {0: stay}, "net.fc.weight": {1: stay}}
    kept |= {f"net.bn2.{name}": {0: stay} for name in ("weight", "bias", "running_mean", "running_var")}
    edit = cut(module, kept)
    compression_state.record(edit.entry(), kept=edit.kept)
    module.on_save_checkpoint(checkpoint := {"state_dict": module.state_dict()})
    fresh = Lazy()
    if made_first:
        fresh(noise(2, 3, 8, 8))
    attach(fresh).load(fresh, checkpoint)
    fresh.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(fresh.eval()(noise(2, 3, 8, 8)), module.eval()(noise(2, 3, 8, 8)))
    assert fresh.net.fc.in_features == 2


def test_the_memory_layout_survives_cuts_and_loads() -> None:
    module = Lit()
    module.to(memory_format=torch.channels_last)
    fresh = copy.deepcopy(module)
    compression_state = attach(module)
    optimizer = torch.optim.AdamW(module.parameters())
    module.training_step((noise(2, 3, 8, 8), torch.tensor([0, 1])), 0).backward()
    optimizer.step()
    edit = cut(module, halve(module, "net.conv1", "net.bn1", "net.conv2"), optimizers=[optimizer])
    compression_state.record(edit.entry(), kept=edit.kept)
    module.on_save_checkpoint(checkpoint := {"state_dict": module.state_dict()})
    attach(fresh).load(fresh, checkpoint)
    for net in (module.net, fresh.net):
        for weight in (net.conv1.weight, net.conv2.weight):
            assert weight.is_contiguous(memory_format=torch.channels_last)
            assert not weight.is_contiguous()
    moment = optimizer.state[module.net.conv2.weight]["exp_avg"]
    assert moment.stride() == module.net.conv2.weight.stride()


def test_reading_the_state_after_a_run_attaches_nothing() -> None:
    module = Lit()
    attach(module)
    release(module)
    module.on_save_checkpoint({"state_dict": module.state_dict()})
    module.on_load_checkpoint({"state_dict": module.state_dict()})
    assert not module._load_state_dict_pre_hooks


def test_a_structure_keeps_nothing_of_a_run() -> None:
    module = Lit()
    wrap_method(module, "training_step", lambda original, *args: original(*args))
    assert "training_step" not in vars(copy_structure(module))
    assert "training_step" in vars(module)
