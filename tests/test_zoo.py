"""The nets of the zoo run, learn, and copy."""

import copy

import pytest
import torch
from torch.utils import _pytree as pytree

from tests.zoo import ZOO


@pytest.mark.parametrize("name", ZOO)
def test_every_parameter_is_reached(name: str) -> None:
    net = ZOO[name]()
    args, kwargs = net.example
    outputs = pytree.tree_leaves(net(*args, **kwargs))
    torch.stack([output.square().mean() for output in outputs]).sum().backward()
    unreached = {key for key, parameter in net.named_parameters() if parameter.grad is None}
    assert unreached == ({"narrow.weight", "narrow.bias"} if name == "control_flow" else set())


@pytest.mark.parametrize("name", ZOO)
def test_a_copy_gives_the_same_answers(name: str) -> None:
    net = ZOO[name]().eval()
    args, kwargs = net.example
    twin = ZOO[name]().eval()
    twin.load_state_dict(copy.deepcopy(net.state_dict()))
    torch.testing.assert_close(twin(*args, **kwargs), net(*args, **kwargs), rtol=0, atol=0)
