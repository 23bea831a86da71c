"""A copy is its own network, and drags nothing along that is none."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_light.export.copies import detached_copy
from tests.export.nets import HOSTS, MODULES, Images, fit
from tests.zoo import ZOO, noise


def ties(net: nn.Module) -> list[int]:
    """For each parameter, which is the first of its names."""
    parameters = [id(parameter) for _, parameter in net.named_parameters(remove_duplicate=False)]
    return [parameters.index(parameter) for parameter in parameters]


@pytest.mark.parametrize("name", sorted(ZOO))
def test_a_copy_is_equal_and_independent(name: str) -> None:
    net = ZOO[name]().train()
    twin = detached_copy(net)
    live, copied = net.state_dict(keep_vars=True), twin.state_dict(keep_vars=True)
    assert list(live) == list(copied)
    for key, tensor in live.items():
        assert torch.equal(tensor, copied[key])
        assert tensor.data_ptr() != copied[key].data_ptr()
    assert ties(twin) == ties(net)
    assert not any(module.training for module in twin.modules())
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    assert all(module.training for module in net.modules())


class Helper:
    """No module, but it holds one."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer


class Owner:
    def __init__(self) -> None:
        self.seen: list[nn.Module] = []

    def look(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.append(module)


def test_owners_of_hooks_are_shared_and_modules_are_copied() -> None:
    net = nn.Sequential(nn.Linear(3, 2))
    data, owner = TensorDataset(noise(4, 3)), Owner()
    net.data, net.loader, net.helper = data, DataLoader(data), Helper(net[0])
    net.optimizer = torch.optim.Adam(net.parameters())
    net[0].register_forward_hook(owner.look)
    twin = detached_copy(net)
    twin(noise(1, 3))
    assert twin.data is data
    assert twin.loader is net.loader
    assert twin.optimizer is net.optimizer
    assert twin.helper.layer is twin[0]
    assert owner.seen == [twin[0]]


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.__name__)
def test_a_copy_has_no_trainer(host: Any) -> None:
    module = MODULES[host](Images())
    trainer = fit(module, host=host)
    module.kept = [trainer]
    twin = detached_copy(module)
    assert twin._trainer is None
    assert twin.kept[0] is trainer
    assert module.trainer is trainer
