"""Optimizer state follows a cut exactly: the small network trains as the large one with zeros in it would."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from lightning_light.errors import SurgeryError, UnsupportedError
from lightning_light.surgery.edit import cut
from lightning_light.surgery.optimizer import (
    check_optimizers,
    check_sliceable,
    order_parameters,
    orphans,
    parameter_order,
    replace_parameters,
    slice_state,
    unwrap,
)
from tests.surgery.runs import halve
from tests.zoo import Plain, noise, tokens


class Lion(torch.optim.Optimizer):
    """A user's own optimizer."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                average = self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))
                update = (0.9 * average + 0.1 * parameter.grad).sign()
                parameter.sub_(group["lr"] * update)
                average.mul_(0.99).add_(parameter.grad, alpha=0.01)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 2e-3),
    "amsgrad": lambda p: torch.optim.Adam(p, 2e-3, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 2e-3),
    "adamw fused": lambda p: torch.optim.AdamW(p, 2e-3, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 2e-3, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adamax": lambda p: torch.optim.Adamax(p, 2e-3),
    "nadam": lambda p: torch.optim.NAdam(p, 2e-3),
    "rprop": lambda p: torch.optim.Rprop(p, 1e-3),
    "asgd": lambda p: torch.optim.ASGD(p, 1e-2),
    "lion": lambda p: Lion(p, 3e-4),
}


def removed_mask(name: str, tensor: Tensor, kept: dict[str, dict[int, Tensor]]) -> Tensor:
    mask = torch.ones_like(tensor)
    for dim, stay in kept.get(name, {}).items():
        gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
        gone[stay] = False
        mask.index_fill_(dim, gone.nonzero().flatten(), 0.0)
    return mask


def step(net: nn.Module, optimizer: torch.optim.Optimizer, masks: dict[str, Tensor] | None = None) -> float:
    optimizer.zero_grad()
    loss = F.cross_entropy(net(noise(8, 3, 8, 8)), tokens(8, below=5))
    loss.backward()
    for name, parameter in net.named_parameters():
        if masks is not None:
            assert parameter.grad is not None
            parameter.grad.mul_(masks[name])
    optimizer.step()
    if masks is not None:  # an optimizer may move a weight without gradient by its momentum: it is not there
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                parameter.mul_(masks[name])
    return loss.item()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_cut_network_trains_as_the_masked_one(name) -> None:
    torch.manual_seed(0)
    net = Plain()
    optimizer = OPTIMIZERS[name](net.parameters())
    for _ in range(5):
        step(net, optimizer)
    masked = copy.deepcopy(net)
    masked_optimizer = OPTIMIZERS[name](masked.parameters())
    masked_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    kept = halve(net)
    masks = {key: removed_mask(key, tensor, kept) for key, tensor in masked.named_parameters()}
    with torch.no_grad():
        for key, parameter in masked.named_parameters():
            parameter.mul_(masks[key])
    objects = list(net.parameters())
    cut(net, kept, optimizers=[optimizer])
    assert [id(p) for p in objects] == [id(p) for p in net.parameters()]
    for parameter, state in optimizer.state.items():
        assert all(value.shape == parameter.shape for value in state.values() if torch.is_tensor(value) and value.ndim)
    large = [step(masked, masked_optimizer, masks) for _ in range(5)]
    small = [step(net, optimizer) for _ in range(5)]
    assert small == pytest.approx(large, abs=2e-6)


@pytest.mark.parametrize("shape", [(6, 4), (4, 4), (6, 4, 3, 3), (5,)])
def test_factored_moments_are_cut_with_their_dimension(shape) -> None:
    parameter = nn.Parameter(torch.randn(shape))
    optimizer = torch.optim.Adafactor([parameter])
    parameter.grad = torch.randn(shape)
    optimizer.step()
    gather = {0: torch.tensor([0, 2, 3])}
    before = dict(optimizer.state[parameter])
    check_sliceable(optimizer, parameter, shape)
    slice_state(optimizer, parameter, shape, gather)
    for key, value in optimizer.state[parameter].items():
        expected = before[key]
        if expected.ndim and expected.shape[0] == shape[0] and expected.numel() > 1:
            expected = expected[gather[0]]
        assert torch.equal(value, expected), key


def hand_made(state: dict[str, Any], shape: tuple[int, ...]) -> tuple[torch.optim.Optimizer, nn.Parameter]:
    parameter = nn.Parameter(torch.zeros(shape))
    optimizer = torch.optim.SGD([parameter], 0.1)
    optimizer.state[parameter] = state
    return optimizer, parameter


def test_rows_and_columns_without_the_missing_dimension_go_by_their_names() -> None:
    state = {"exp_avg_sq_row": torch.arange(4.0), "exp_avg_sq_col": torch.arange(4.0), "step": 3, "rms": None}
    optimizer, parameter = hand_made(state, (4, 4))
    slice_state(optimizer, parameter, (4, 4), {0: torch.tensor([1, 2])})
    assert optimizer.state[parameter]["exp_avg_sq_row"].tolist() == [1, 2]
    assert optimizer.state[parameter]["exp_avg_sq_col"].tolist() == [0, 1, 2, 3]
    assert optimizer.state[parameter]["step"] == 3


@pytest.mark.parametrize(
    "state",
    [
        {"preconditioner": torch.zeros(5, 5)},
        {"absmax": torch.zeros(2)},
        {"moment": torch.zeros(4)},
        {"history": [torch.zeros(4, 4)]},
    ],
)
def test_state_of_unknown_relation_is_refused_and_left_whole(state) -> None:
    optimizer, parameter = hand_made({"good": torch.zeros(4, 4), **state}, (4, 4))
    with pytest.raises(UnsupportedError, match="elementwise optimizer"):
        check_sliceable(optimizer, parameter, (4, 4))
    with pytest.raises(UnsupportedError):
        slice_state(optimizer, parameter, (4, 4), {0: torch.tensor([0])})
    assert optimizer.state[parameter]["good"].shape == (4, 4)


def test_a_refused_cut_changes_nothing() -> None:
    net = Plain()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    optimizer.state[net.conv2.weight] = {"preconditioner": torch.zeros(7, 7)}
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(UnsupportedError):
        cut(net, halve(net), optimizers=[optimizer])
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_lbfgs_is_refused_before_it_has_a_state() -> None:
    net = Plain()
    with pytest.raises(UnsupportedError, match="LBFGS"):
        check_optimizers([torch.optim.LBFGS(net.parameters())])
    with pytest.raises(UnsupportedError, match="LBFGS"):
        cut(net, halve(net), optimizers=[torch.optim.LBFGS(net.parameters())])


def test_lightnings_wrapper_is_looked_into() -> None:
    optimizer = torch.optim.SGD(Plain().parameters(), 0.1)
    assert unwrap(LightningOptimizer(optimizer)) is optimizer
    assert unwrap(optimizer) is optimizer


@pytest.mark.parametrize("named", [False, True])
def test_new_parameters_take_the_old_ones_place(named) -> None:
    net = Plain()
    slow, fast = list(net.conv1.named_parameters("conv1")), list(net.fc.named_parameters("fc"))
    groups = [{"params": slow, "lr": 0.1}, {"params": fast, "lr": 0.2, "weight_decay": 0.5}]
    if not named:
        groups = [{**group, "params": [parameter for _, parameter in group["params"]]} for group in groups]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    F.cross_entropy(net(noise(2, 3, 8, 8)), tokens(2, below=5)).backward()
    optimizer.step()
    old, bias = net.fc.weight, net.fc.bias
    first, second = nn.Parameter(torch.zeros(2, 12)), nn.Parameter(torch.zeros(5, 2))
    assert replace_parameters([optimizer], {old: [first, second]}, {first: "fc.0.weight"}) == 1
    assert [id(p) for p in optimizer.param_groups[1]["params"]] == [id(first), id(second), id(bias)]
    assert optimizer.param_groups[1]["weight_decay"] == 0.5
    assert old not in optimizer.state
    assert bias in optimizer.state
    if named:
        assert optimizer.param_groups[1]["param_names"] == ["fc.0.weight", "fc.weight.1", "fc.bias"]


def test_order_is_restored_by_name_and_strangers_stay() -> None:
    net, stranger = Plain(), nn.Parameter(torch.zeros(3))
    named = dict(net.named_parameters())
    written = torch.optim.SGD([{"params": [named["fc.bias"], stranger, named["fc.weight"]]}], 0.1)
    order = parameter_order([written], net)
    assert order == [[["fc.bias", None, "fc.weight"]]]
    other = torch.optim.SGD([named["fc.weight"], named["fc.bias"], stranger], 0.1)
    assert order_parameters([other], net, order) == 3
    assert [id(p) for p in other.param_groups[0]["params"]] == [
        id(named["fc.bias"]),
        id(stranger),
        id(named["fc.weight"]),
    ]
    assert orphans([other], net) == 1
    assert order_parameters([other], net, [[["fc.bias"], ["fc.weight"]]]) == 0  # Lightning says what is wrong
    with pytest.raises(SurgeryError, match=r"fc.none"):
        order_parameters([other], net, [[["fc.none"]]])
