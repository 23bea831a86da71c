"""One module takes another's place, and optimizers, hooks, copies and the edit log follow."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_light.errors import SurgeryError
from lightning_light.surgery.operations import register_operation, replay_edits
from lightning_light.surgery.replace import replace_modules
from tests.surgery.runs import two_factors
from tests.zoo import Plain, noise


class Shares(nn.Module):
    """One layer under two names, and inside a list."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.again = self.one
        self.rows = nn.ModuleList([self.one, nn.Linear(4, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rows[1](self.again(self.one(x)))


def factored(net: Any, **options: Any) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net(noise(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    old = net.fc
    new = two_factors(old, 2)
    followers = {old.weight: [new[0].weight, new[1].weight]}
    replace_modules(net, {"fc": new}, optimizers=[optimizer], parameters=followers, **options)
    return new, optimizer


def test_a_module_takes_anothers_place() -> None:
    net = Plain().eval()
    calls: list[int] = []
    handle = net.fc.register_forward_hook(lambda *_: calls.append(1))
    bias = net.fc.bias
    new, optimizer = factored(net)
    assert net.fc is new
    assert not new.training
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    assert held == [id(parameter) for parameter in net.parameters()]
    assert bias in optimizer.state
    calls.clear()
    net(noise(2, 3, 8, 8))
    assert calls == [1]
    handle.remove()
    net(noise(2, 3, 8, 8))
    assert calls == [1]


def test_averaged_copies_get_a_copy_and_keep_the_average_of_what_stays() -> None:
    net = Plain()
    averaged_model = copy.deepcopy(net)
    with torch.no_grad():
        averaged_model.fc.bias.fill_(7)
    average = averaged_model.fc.bias
    new, _ = factored(net, averaged_models=[averaged_model])
    assert averaged_model.fc is not new
    assert averaged_model.fc[1].bias is average
    assert torch.equal(averaged_model.fc[0].weight, new[0].weight)
    assert averaged_model.fc[0].weight is not new[0].weight
    assert [n for n, _ in averaged_model.named_parameters()] == [n for n, _ in net.named_parameters()]


def test_it_is_replaced_under_all_its_names() -> None:
    model, new = Shares(), nn.Linear(4, 4)
    replace_modules(model, {"again": new})
    assert model.one is model.again is model.rows[0] is new


def test_a_wrapper_may_hold_what_it_replaces() -> None:
    net, calls = Plain(), []
    net.fc.register_forward_hook(lambda *_: calls.append(1))
    old = net.fc
    replace_modules(net, {"fc": nn.Sequential(old, nn.ReLU())})
    net(noise(2, 3, 8, 8))
    assert net.fc[0] is old
    assert calls == [1]


def refused(net: Any, match: str, name: str = "fc", **options: Any) -> None:
    before = {key: id(module) for key, module in net.named_modules(remove_duplicate=False)}
    with pytest.raises(SurgeryError, match=match):
        replace_modules(net, {name: nn.Linear(12, 5)}, **options)
    assert {key: id(module) for key, module in net.named_modules(remove_duplicate=False)} == before


def test_what_cannot_be_replaced_is_refused_and_nothing_changes() -> None:
    net = Plain()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    refused(net, "expected the name of a module inside `Plain`", name="none")
    refused(net, "expected the name of a module inside `Plain`", name="")
    refused(net, "without an owner", optimizers=[optimizer])
    gone = {net.fc.weight: [], net.fc.bias: []}
    refused(net, "would never be trained", optimizers=[optimizer], parameters=gone)
    refused(net, "expected the name of a module inside `Linear`", averaged_models=[nn.Linear(1, 1)])
    parametrizations.weight_norm(net.conv1)
    refused(net, "parametrization", name="conv1")


def test_a_tied_parameter_is_not_replaced() -> None:
    net = Plain()
    net.twin = nn.Linear(12, 5)
    net.twin.weight = net.fc.weight
    refused(net, "used elsewhere", parameters={net.fc.weight: []})


def test_an_operation_has_one_meaning() -> None:
    with pytest.raises(ValueError, match=r"'channels'.*taken"):
        register_operation("channels")(lambda model, entry: None)


def test_a_replay_leaves_the_random_numbers_alone() -> None:
    net = Plain()
    state = torch.random.get_rng_state()
    replay_edits(net, [{"op": "tests/factor", "name": "fc", "rank": 2}])
    assert isinstance(net.fc, nn.Sequential)
    assert torch.equal(torch.random.get_rng_state(), state)
