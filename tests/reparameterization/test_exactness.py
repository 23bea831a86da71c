"""Expansion and merging preserve the function of any convolution, borders included, and so does merging by batch."""

import copy
import itertools
import threading
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from torch import Tensor, nn
from typing_extensions import override

from lightning_light.errors import NoEffectWarning
from lightning_light.reparameterization import ACB, DBB, OREPA, Branches, Form, RepVGG, expand_branches, merge_branches
from lightning_light.reparameterization.apply import branched_layers
from lightning_light.reparameterization.batch_statistics import _Moments

FORMS = [ACB(), RepVGG(), Branches(3), DBB(), OREPA()]
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-10}


@st.composite
def convolutions(draw: Any) -> dict[str, Any]:
    """Arguments of a convolution that runs on an image of 13 x 11."""
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    groups = draw(st.sampled_from([1, 2, 4]))
    named = draw(st.sampled_from([None, "valid", "same" if stride == (1, 1) else "valid"]))
    return {
        "in_channels": 4,
        "out_channels": draw(st.sampled_from([4, 8])),
        "kernel_size": kernel,
        "stride": stride,
        "padding": named or draw(st.tuples(st.integers(0, 3), st.integers(0, 3))),
        "dilation": draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        "groups": groups,
        "bias": draw(st.booleans()),
    }


def difference(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())


def trained(model: nn.Module, x: Tensor) -> None:
    """Give every parameter other values, and every batch norm other statistics, as training does."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        for _ in range(3):
            model.train()(x + torch.randn_like(x))


@pytest.mark.parametrize("form", [ACB(), DBB()], ids=repr)
def test_each_branch_begins_with_the_standard_deviation_of_its_initial_scale(form: Form) -> None:
    torch.manual_seed(0)
    model, x, outputs = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1)), torch.randn(16, 4, 9, 9), []
    expand_branches(model, x, form, initial_scale=1 / 3)
    for branch in model[0].branches:
        branch.register_forward_hook(lambda module, args, output: outputs.append(output))
        branch.layers[0].register_forward_hook(lambda *args: None)  # so that the layers are called
    whole = model(x)
    assert len(outputs) == len(form.branches(model[0].main))
    for output in outputs:
        torch.testing.assert_close(output.std((0, 2, 3), correction=0), torch.full((8,), 1 / 3), rtol=2e-3, atol=0.0)
    torch.testing.assert_close(whole, model[0].main(x) + sum(outputs))
    before = model.eval()(x)
    merge_branches(model)
    assert difference(model(x), before) < 1e-5


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("form", FORMS, ids=repr)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(arguments=convolutions())
def test_any_convolution_is_expanded_and_merged_exactly(
    form: Form, dtype: torch.dtype, arguments: dict[str, Any]
) -> None:
    assume(form.branches(nn.Conv2d(**arguments)))
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(**arguments)).to(dtype), torch.randn(3, 4, 13, 11, dtype=dtype)
    before = model(x)
    expand_branches(model, x, form)
    assert branched_layers(model)
    for mode in (True, False):
        assert difference(model.train(mode)(x), before) <= BOUNDS[dtype]
    trained(model, x)
    expanded = model.eval()(x)
    assert difference(expanded, before) > 1e-2, "the branches take part"
    assert merge_branches(model, x).layers == ("0",)
    assert [type(part) for part in model] == [nn.Conv2d]
    assert difference(model(x), expanded) <= BOUNDS[dtype]


def test_a_whole_network_of_trained_weights_is_preserved() -> None:
    torch.manual_seed(0)
    layers = [(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(4)]
    model, x = nn.Sequential(*itertools.chain(*layers)), torch.randn(4, 8, 10, 10)
    trained(model, x)
    before = model.eval()(x)
    expand_branches(model, x, ACB())
    assert difference(model(x), before) <= 1e-5
    trained(model, x)
    expanded = model.eval()(x)
    merge_branches(model)
    assert difference(model(x), expanded) <= 1e-5


@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_every_branch_learns(form: Form) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
    expand_branches(model, None, form)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 4, 6, 6)).square().mean().backward()
        optimizer.step()
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kernels = [name for name, parameter in model.named_parameters() if parameter.ndim == 4]
    branches = branched_layers(model)["0"].branches
    scales = [names[id(branch.scale if form == OREPA() else branch.norm.weight)] for branch in branches]
    assert not set(still) & {*kernels, *scales}


class ReadOutside(nn.Module):
    """Code that reads the weight of the layer instead of calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        return nn.functional.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding)


def test_the_weight_of_summed_kernels_is_readable_and_its_gradient_reaches_the_branches() -> None:
    torch.manual_seed(0)
    model, x = ReadOutside(), torch.randn(2, 4, 8, 8)
    expand_branches(model, x, OREPA())
    trained(model, x)
    y = model(x)
    y.square().mean().backward()
    assert torch.equal(y, model.conv(x))
    assert all(parameter.grad is not None for parameter in model.parameters())
    merge_branches(model, x)
    assert difference(model(x), y) <= 1e-5


def test_the_same_branches_are_drawn_in_every_process_and_no_random_number_is_taken() -> None:
    weights = []
    for seed in (1, 2):
        model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        expand_branches(model, None, Branches(3))
        assert torch.equal(torch.get_rng_state(), state)
        weights.append([value for name, value in model.state_dict().items() if "branches" in name])
    assert all(map(torch.equal, *weights))
    kernels = [value for value in weights[0] if value.shape == (4, 4, 3, 3)]
    assert len(kernels) == 2
    assert not torch.equal(*kernels), "branches that start equal stay equal"


class Odd(nn.Module):
    """Convolutions that are left alone, each for a reason."""

    def __init__(self) -> None:
        super().__init__()
        self.good = nn.Conv2d(4, 4, 3, padding=1)
        self.point = nn.Conv2d(4, 4, 1)
        self.transposed = nn.ConvTranspose2d(4, 4, 3, padding=1)
        self.mirrored = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1))
        self.frozen = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.second.weight = self.first.weight
        self.untrained = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            x = part(x)
        return x


def test_what_cannot_be_expanded_is_left_alone_and_named_with_the_reason() -> None:
    torch.manual_seed(0)
    model, x = Odd(), torch.randn(2, 4, 8, 8)
    before = model(x)
    parameters = [parameter for name, parameter in model.named_parameters() if "untrained" not in name]
    plan = expand_branches(model, x, ACB(), optimizers=[torch.optim.SGD(parameters, lr=0.1)])
    assert list(plan.layers) == ["good"]
    reasons = {
        "point": "ACB has no branches for a 1x1 kernel",
        "transposed": "a ConvTranspose2d",
        "mirrored": "padding_mode='reflect'",
        "normed": "parametrization",
        "frozen": "frozen",
        "first": "shared with second.weight",
        "second": "shared with first.weight",
        "untrained": "no optimizer",
    }
    assert set(plan.skipped) == set(reasons)
    for name, reason in reasons.items():
        assert reason in plan.skipped[name]
    assert difference(model(x), before) <= 1e-5


def test_nothing_to_expand_is_warned_about_with_the_reason() -> None:
    with pytest.warns(NoEffectWarning, match="ACB has no branches for a 1x1 kernel"):
        plan = expand_branches(nn.Sequential(nn.Conv2d(4, 4, 1)), None, ACB())
    assert not plan.layers


def test_a_second_expansion_leaves_branches_alone() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3))
    expand_branches(model, None, ACB(), targets="0")
    plan = expand_branches(model, None, ACB())
    assert list(plan.layers) == ["1"]
    assert not plan.skipped


@pytest.mark.parametrize("bias", [True, False])
def test_optimizer_state_of_the_convolution_stays_and_branches_join_its_group(bias: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=bias), nn.Conv2d(4, 4, 1)), torch.randn(2, 4, 8, 8)
    groups = [{"params": list(model[1].parameters())}, {"params": list(model[0].parameters()), "lr": 0.02}]
    optimizer = torch.optim.Adam(groups, lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    step()
    weight = model[0].weight
    momentum = optimizer.state[weight]["exp_avg"].clone()
    expand_branches(model, x, ACB(), optimizers=[optimizer])
    assert {id(p) for p in optimizer.param_groups[1]["params"]} == {id(p) for p in model[0].parameters()}
    assert torch.equal(optimizer.state[weight]["exp_avg"], momentum)
    step()
    momentum = optimizer.state[weight]["exp_avg"].clone()
    merge_branches(model, x, optimizers=[optimizer])
    assert model[0].weight is weight
    assert {id(p) for p in optimizer.param_groups[1]["params"]} == {id(p) for p in model[0].parameters()}
    assert torch.equal(optimizer.state[weight]["exp_avg"], momentum)
    assert set(optimizer.state) == set(model.parameters())
    step()


def layer_by_layer(model: nn.Module) -> nn.Module:
    """Return a copy that calls every layer, because one is observed."""
    called = copy.deepcopy(model)
    for branched in branched_layers(called).values():
        branched.branches[-1].norm.register_forward_hook(lambda *_: None)
    return called


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output, and all gradients and buffers after one backward pass."""
    x = x.clone().requires_grad_()
    y = model.train()(x)
    (y * torch.linspace(-1.0, 1.0, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()} | dict(model.named_buffers())
    return y, {**found, "input": x.grad}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("form", FORMS[:-1], ids=repr)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(arguments=convolutions())
def test_outputs_gradients_and_running_statistics_are_those_of_the_layers(
    form: Form, arguments: dict[str, Any]
) -> None:
    assume(form.branches(nn.Conv2d(**arguments)))
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(**arguments)).double(), 2.0 + torch.randn(3, 4, 13, 11, dtype=torch.float64)
    expand_branches(model, None, form)
    trained(model, x)
    called = layer_by_layer(model)
    (found, values), (wanted, expected) = step(model, x), step(called, x)
    assert difference(found, wanted) <= BOUNDS[torch.float64]
    largest = max(float(value.abs().max()) for name, value in expected.items() if name.endswith("weight"))
    for name, value in expected.items():
        assert float((values[name] - value).abs().max()) <= 1e-10 * max(largest, float(value.abs().max())), name


def test_a_frozen_batch_norm_uses_and_keeps_its_running_statistics() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), torch.randn(4, 4, 8, 8)
    expand_branches(model, None, DBB())
    trained(model, x)
    model.train()
    for branch in branched_layers(model)["0"].branches:
        branch.layers.eval()
    before = copy.deepcopy(dict(model.named_buffers()))
    assert difference(model(x), copy.deepcopy(model).eval()(x)) <= 1e-5
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_outputs_that_hardly_vary_stay_finite() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1))
    expand_branches(model, None, DBB())
    trained(model, torch.randn(2, 3, 8, 8))
    weights = [part.weight for part in model.modules() if isinstance(part, nn.Conv2d)]
    with torch.no_grad():
        for weight in weights:
            weight -= weight.mean(1, keepdim=True)  # equal channels cancel
    gray = (1000.0 * torch.rand(4, 1, 8, 8)).expand(-1, 3, -1, -1)
    assert model.train()(gray).isfinite().all()


def test_bfloat16_rounds_values_but_not_statistics() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)), 1.0 + torch.randn(8, 8, 12, 12)
    expand_branches(model, None, DBB())
    trained(model, x)
    called = layer_by_layer(model).train()
    expected = called(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.train()(x)
    assert found.dtype == torch.bfloat16
    assert difference(found.float(), expected) <= 0.02
    for (name, buffer), wanted in zip(model.named_buffers(), called.buffers(), strict=True):
        assert difference(buffer.double(), wanted.double()) <= 0.01, name


def test_a_batch_of_one_position_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    expand_branches(model, None, RepVGG())
    with pytest.raises(ValueError, match="more than one position per channel"):
        model.train()(torch.randn(1, 4, 3, 3))


@dataclass(frozen=True)
class OneBranch(Form):
    """A form of a user."""

    branch: tuple[str, int, int]

    @override
    def branches(self, conv: nn.Conv2d) -> list[tuple[str, int, int]]:
        return [self.branch]


@pytest.mark.parametrize(
    ("branch", "arguments"),
    [
        (("conv", 5, 5), {}),
        (("conv", 0, 1), {}),
        (("identity", 1, 1), {"stride": 2}),
        (("identity", 1, 1), {"out_channels": 8}),
        (("pool", 3, 3), {"out_channels": 8}),
        (("conv_pool", 3, 3), {"dilation": 2}),
    ],
)
def test_branches_that_cannot_be_merged_are_refused(branch: tuple[str, int, int], arguments: dict[str, int]) -> None:
    model = nn.Sequential(nn.Conv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, **arguments}))
    with pytest.raises(ValueError, match=f"`Form.branches` returned .*{branch[0]}.*expected a kernel within"):
        expand_branches(model, None, OneBranch(branch))
    assert type(model[0]) is nn.Conv2d


def test_derivatives_of_moments_up_to_the_second() -> None:
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    for groups in (1, 2, 4):
        assert torch.autograd.gradcheck(lambda x, groups=groups: _Moments.apply(x, groups), x)
        assert torch.autograd.gradgradcheck(lambda x, groups=groups: _Moments.apply(x, groups), x)


def test_gradients_of_torch_func_are_those_of_a_backward_pass() -> None:
    model, x = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), torch.randn(2, 4, 6, 6)
    expand_branches(model, None, DBB())
    trained(model, x)
    model.train()(x).square().sum().backward()

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return torch.func.functional_call(model, {**parameters, **buffers}, (x,)).square().sum()

    found = torch.func.grad(loss)({name: parameter.detach() for name, parameter in model.named_parameters()})
    for name, parameter in model.named_parameters():
        assert torch.allclose(found[name], parameter.grad, rtol=1e-5, atol=1e-4), name


@pytest.mark.parametrize("form", FORMS[:-1], ids=repr)
def test_no_batch_norm_runs_in_training_unless_a_layer_is_observed(form: Form) -> None:
    model, x = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), torch.randn(2, 4, 8, 8)
    expand_branches(model, None, form)
    for expanded, runs in ((model, False), (layer_by_layer(model), True)):
        nodes, found = [expanded.train()(x).grad_fn], set()
        while nodes:
            node = nodes.pop()
            found.add(type(node).__name__)
            nodes += [following for following, _ in node.next_functions if following is not None]
        assert any("BatchNorm" in name for name in found) == runs


def test_expanded_layers_compile_into_one_graph() -> None:
    model, x = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), torch.randn(2, 4, 8, 8)
    expand_branches(model, None, DBB())
    trained(model, x)
    expected = copy.deepcopy(model).train()(x)
    assert difference(torch.compile(model.train(), backend="eager", fullgraph=True)(x), expected) <= 1e-5


def observe(lock: Any, *_: Any) -> None:
    """Return nothing, as a hook."""


def test_branches_are_merged_whose_hooks_refer_to_what_cannot_be_copied() -> None:
    model, x = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), torch.randn(2, 4, 8, 8)
    expand_branches(model, None, DBB())
    trained(model, x)
    branched_layers(model)["0"].branches[0].norm.register_forward_hook(partial(observe, threading.Lock()))
    expected = model.eval()(x)
    merge_branches(model)
    assert difference(model(x), expected) <= 1e-5
