"""Narrower networks compute, and train, what networks without the other channels do; the whole one stays as it was."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_light.copies import copy_network
from lightning_light.criteria import Magnitude
from lightning_light.dependency import trace_dependencies
from lightning_light.errors import ManifestError, UnsupportedError
from lightning_light.example_input import ExampleInput
from lightning_light.measure import count_cost
from lightning_light.nested import tensors_in
from lightning_light.schema import Context, check_schema
from lightning_light.slimmable.networks import NarrowNetwork, PlainNetwork
from lightning_light.slimmable.plan import WidthOptions, WidthPlan, plan_widths
from lightning_light.surgery.edit import cut, take
from tests.zoo import ZOO, noise

FAST = {"attention", "group_norm", "grouped", "residual", "tied_embedding"}
NETS = [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in ZOO]


def planned(net: Any, *widths: float, part: str = "", targets: Any = None) -> WidthPlan:
    args, kwargs = net.example
    options = WidthOptions((1.0, *widths), Magnitude(), targets, 1)
    return plan_widths(net, trace_dependencies(net, args, kwargs), ExampleInput(args, kwargs), options, part)


def called(network: Any, net: Any) -> torch.Tensor:
    """The sum of all outputs; the same dropout at every call."""
    args, kwargs = net.example
    torch.manual_seed(0)
    return sum(out.square().sum() for out in tensors_in(network(*args, **kwargs), objects=True))


@pytest.mark.parametrize("name", NETS)
def test_a_narrow_call_equals_the_network_without_the_other_channels(name) -> None:
    net = ZOO[name]()
    plain = planned(net, 0.5).networks[0.5]
    small = copy_network(net)
    cut(small, plain["kept"], attributes=plain["attributes"])
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
    before, text = copy.deepcopy(net.state_dict()), repr(net)
    narrow = NarrowNetwork(net, plain, "")
    for network, parent in ((narrow, net), (small, small)):
        parent.train()
        called(network, net).backward()
        parent.eval()
    assert torch.equal(called(narrow, net), called(small, net))  # in evaluation, with the statistics of that step
    gradients = {key: p.grad for key, p in small.named_parameters()}
    for key, parameter in net.named_parameters():
        if (expected := gradients[key]) is None:
            assert parameter.grad is None
            continue
        kept = plain["kept"].get(key, {})
        torch.testing.assert_close(take(parameter.grad, kept), expected)
        torch.testing.assert_close(parameter.grad.abs().sum(), expected.abs().sum())  # zeros elsewhere
    assert repr(net) == text
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_narrower_networks_are_nested_and_cost_what_is_counted() -> None:
    net = ZOO["residual"]()
    plan = planned(net, 0.75, 0.25)
    wide, narrow = (plan.networks[width]["kept"]["conv2.weight"] for width in (0.75, 0.25))
    assert [wide[0].numel(), wide[1].numel(), narrow[0].numel(), narrow[1].numel()] == [9, 6, 3, 2]
    assert all(set(narrow[dim].tolist()) < set(wide[dim].tolist()) for dim in (0, 1))
    small = copy.deepcopy(net)
    cut(small, plan.networks[0.25]["kept"])
    assert 2 * plan.costs[0.25].macs == count_cost(small, *net.example).macs  # which has two samples
    assert plan.lines[:4] == [
        "(width 1): 66.1k MACs (100%), 1.89k params (100%)",
        "(width 0.75): 39.8k MACs (60.2%), 1.13k params (59.8%)",
        "(width 0.25): 6.74k MACs (10.2%), 187 params (9.9%)",
        "stem: 8 -> 6, 2 channels",
    ]


class TwoParts(nn.Module):
    example = (noise(2, 6),), {}

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))
        self.head = nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x))


def test_channels_that_are_used_outside_of_the_part_are_kept() -> None:
    net = TwoParts()
    plan = planned(net, 0.5, part="encoder")
    assert plan.lines[2:4] == ["encoder.0: 8 -> 4 channels", "encoder.3: kept (used outside of `encoder`)"]
    narrow = NarrowNetwork(net, plan.networks[0.5], "encoder")
    assert narrow(*net.example[0]).shape == (2, 10)
    assert plan.networks[0.5]["statistics"]["encoder.1.num_batches_tracked"] == 1
    assert net.encoder[1].num_batches_tracked == 0


def test_a_network_without_channels_to_leave_out_is_refused() -> None:
    net = ZOO["plain"]()
    with pytest.raises(UnsupportedError, match=r"widths=\[1.0, 0.5\]\)` on `Plain`: expected layers that can lose"):
        planned(net, 0.5, targets="fc")


DAMAGES: dict[str, Any] = {
    "unknown tensor": lambda n: n["kept"].update(x={0: torch.tensor([0])}),
    "position": lambda n: n["kept"]["conv1.weight"].update({0: torch.tensor([0, 99])}),
    "order": lambda n: n["kept"]["conv1.weight"].update({0: torch.tensor([1, 0])}),
    "dimension": lambda n: n["kept"]["conv1.weight"].update({7: torch.tensor([0])}),
    "statistics": lambda n: n["statistics"].update({"bn1.running_var": torch.ones(3)}),
    "module": lambda n: n["attributes"].update(x={"num_features": 2}),
    "attribute": lambda n: n["attributes"]["bn1"].update(num_features="2"),
    "missing": lambda n: n.pop("statistics"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_state_is_refused(what) -> None:
    net = ZOO["plain"]()
    plain = planned(net, 0.5).networks[0.5]
    check_schema(plain, PlainNetwork, "state", Context.of(net, {}))
    DAMAGES[what](plain)
    with pytest.raises(ManifestError, match="damaged at `state"):
        check_schema(plain, PlainNetwork, "state", Context.of(net, {}))


def test_slices_keep_the_layout_of_the_parameters() -> None:
    """Else other, slower kernels run, which do not compute the same last bit."""
    net = ZOO["residual"]().to(memory_format=torch.channels_last)
    plain = planned(net, 0.5).networks[0.5]
    strides = []
    net.conv2.register_forward_pre_hook(lambda module, args: strides.append(module.weight.stride()))
    NarrowNetwork(net, plain, "")(*net.example[0])
    small = copy_network(net)
    cut(small, plain["kept"], attributes=plain["attributes"])
    assert strides == [small.conv2.weight.stride()]
