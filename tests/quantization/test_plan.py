"""What is rounded, on every net of the zoo; and that nothing of the net changes."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_light.example_input import ExampleInput
from lightning_light.export import ONNX, export_model
from lightning_light.quantization.attachment import Attachment
from lightning_light.quantization.operations import moves
from lightning_light.quantization.parameters import first_values
from lightning_light.quantization.plan import Group, Plan, plan_sites
from lightning_light.quantization.recipes import Int8, Recipe
from lightning_light.quantization.record import record
from lightning_light.quantization.rules import WeightRule
from lightning_light.quantization.state import attach_from, begin
from tests.zoo import ZOO, noise


def plan_of(model: nn.Module, *args: Any, recipe: Recipe = Int8(), **kwargs: Any) -> Plan:
    operations = record(model, args, kwargs)
    return plan_sites(
        operations, recipe.rules(model, [key.split("|")[0] for key in (o.key for o in operations) if key])
    )


def calibrated(model: nn.Module, example: ExampleInput, recipe: Recipe = Int8()) -> Attachment:
    """Attached, having seen the example, and rounding."""
    state: dict[str, Any] = {}
    begin(state, model, example, recipe)
    attachment = attach_from(model, state)
    assert attachment is not None
    attachment.observing = True
    with torch.no_grad():
        model(*example.args, **example.kwargs)
    attachment.observing, attachment.form = False, "rounded"
    ranges = attachment.observed(torch.device("cpu"))
    attachment.use(ranges)
    attachment.learned = {**attachment.first_steps, **first_values(attachment.grids, attachment.scales)}
    attachment.use(ranges)
    return attachment


def decibels(right: Tensor, found: Tensor) -> float:
    return float(10 * torch.log10(right.square().sum() / (right - found).square().sum()))


@pytest.mark.parametrize("name", list(ZOO))
@pytest.mark.parametrize("engine", ["qnnpack", "x86"])
def test_every_net_of_the_zoo_is_rounded_and_stays_close(name, engine) -> None:
    torch.manual_seed(0)
    net = ZOO[name]().eval()
    args, kwargs = net.example
    before, keys = vars(net).copy(), list(net.state_dict())
    with torch.no_grad():
        right = [leaf for leaf in tree_leaves(net(*args, **kwargs)) if isinstance(leaf, Tensor)]
        attachment = calibrated(net, ExampleInput(args, kwargs), Int8(engine=engine))
        assert attachment.plan.weights
        assert all(scale is not None for scale in attachment.scales)
        found = [leaf for leaf in tree_leaves(net(*args, **kwargs)) if isinstance(leaf, Tensor)]
        assert list(net.state_dict()) == keys
        assert min(map(decibels, right, found)) > (33 if engine == "qnnpack" else 26)
        attachment.let_go()
        again = [leaf for leaf in tree_leaves(net(*args, **kwargs)) if isinstance(leaf, Tensor)]
    assert all(map(torch.equal, right, again))
    assert vars(net).keys() == before.keys()
    assert not any(module._forward_hooks or len(module._forward_pre_hooks) > 1 for module in net.modules())


def test_a_block_is_rounded_where_its_kernel_ends() -> None:
    plan = plan_of(ZOO["plain"](), noise(2, 3, 8, 8))
    assert list(plan.weights) == ["conv1|1|conv2d|1", "conv2|1|conv2d|1", "fc|1|linear|1"]
    assert set(plan.weights.values()) == {WeightRule(8, -127, 127)}
    assert plan.groups["conv1|1|conv2d|1"] == Group("|1|relu|1", "bn1|1|batch_norm|1", "|1|relu|1")
    assert plan.groups["fc|1|linear|1"] == Group("fc|1|linear|1")
    assert plan.arguments == {"conv1|1|conv2d|1": {0: 0}}
    assert list(plan.outputs) == ["|1|relu|1", "|1|relu|2", "|1|mean|1", "fc|1|linear|1"]
    assert plan.outputs["|1|mean|1"] == plan.outputs["|1|relu|2"], "a mean stays on the grid of what it averages"
    assert [grid.positive for grid in plan.grids] == [False, True, True, False]


def test_a_plan_survives_plain_types() -> None:
    plan = plan_of(ZOO["squeeze_excite"](), noise(2, 3, 8, 8))
    assert Plan.from_plain(plan.plain()) == plan


def test_a_residual_stream_that_a_norm_reads_stays_float() -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.first(x)
            return x + self.second(self.norm(x))

    plan = plan_of(Stream(), noise(2, 6))
    assert "|1|__add__|1" not in plan.outputs
    assert "norm|1|layer_norm|1" in plan.outputs


def test_transposed_convolutions_have_one_scale_and_keep_their_batch_norm() -> None:
    net = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    plan = plan_of(net, noise(2, 3, 4, 4))
    channels = {key: rule.per_channel for key, rule in plan.weights.items()}
    assert channels == {"0|1|conv_transpose2d|1": False, "3|1|conv2d|1": True}
    assert not any(group.batch_norm for group in plan.groups.values())


def test_relu6_however_it_is_written() -> None:
    class Six(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu6(self.convs[0](x))
            x = F.hardtanh(self.convs[1](x), 0.0, 6.0)
            x = self.convs[2](x).clamp(min=0, max=6)
            return self.convs[3](x).clamp(-1, 1)

    plan = plan_of(Six(), noise(1, 3, 4, 4))
    assert [grid.cap for grid in plan.grids] == [None, 6.0, 6.0, 6.0, None]


def test_layers_can_be_kept_float() -> None:
    plan = plan_of(ZOO["plain"](), noise(2, 3, 8, 8), recipe=Int8(keep_float="fc"))
    assert "fc|1|linear|1" not in plan.weights
    assert plan.left_float == {"fc": "asked for by `keep_float`"}


def test_a_layer_that_is_used_twice_has_two_places() -> None:
    plan = plan_of(ZOO["reused"](), *ZOO["reused"]().example[0])
    calls = {key.split("|")[1] for key in plan.weights}
    assert calls == {"1", "2"}


def test_keyword_arguments_and_weights_given_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(noise(4, 6))

        def forward(self, *, x: Tensor) -> Tensor:
            return F.linear(x, weight=self.w)

    net = Named()
    attachment = calibrated(net, ExampleInput(kwargs={"x": noise(2, 6)}))
    assert attachment.plan.arguments == {"|1|linear|1": {0: 0}}
    assert decibels(noise(2, 6) @ net.w.T.detach(), net(x=noise(2, 6)).detach()) > 35


def test_an_error_in_forward_leaves_no_mode_behind() -> None:
    net = ZOO["plain"]()
    attachment = calibrated(net, ExampleInput((noise(2, 3, 8, 8),)))
    for _ in range(2):
        with pytest.raises(RuntimeError):
            net(noise(2, 4, 8, 8))
        assert not attachment.inside
        assert torch.overrides._get_current_function_mode() is None
    attachment.let_go()


def test_a_sum_that_begins_with_zero_keeps_the_grid_of_what_is_added() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(3))
            self.last = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(sum(layer(x) for layer in self.layers) * 1)

    plan = calibrated(Branches().eval(), ExampleInput((noise(2, 3, 8, 8),))).plan
    assert "|1|__radd__|1" not in plan.outputs
    assert [key.split("|")[2] for key in plan.outputs] == ["conv2d", "conv2d", "add", "conv2d", "add", "conv2d"]


@pytest.mark.parametrize(
    ("name", "other", "right"),
    [
        ("add", 0, True),
        ("__radd__", 0.0, True),
        ("mul", 1, True),
        ("add", 1, False),
        ("mul", 0, False),
        ("mul", np.ones(3), False),
        ("add", torch.zeros(3), False),
    ],
)
def test_only_a_plain_number_that_changes_nothing_leaves_a_grid_alone(name, other, right) -> None:
    assert moves(name, (torch.ones(3), other), {}) is right


def test_a_batch_of_any_size_may_be_multiplied_by_its_size(tmp_path) -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * x.shape[0]

    net, x = Counted().eval(), noise(3, 4)
    calibrated(net, ExampleInput((x,)))
    export_model(net, (x,), tmp_path / "net.onnx", exporter=ONNX(), latency_runs=1)
    run = ONNX().load(tmp_path / "net.onnx")
    with torch.no_grad():
        for batch in (noise(1, 4), noise(5, 4)):
            assert torch.equal(torch.as_tensor(tree_leaves(run(batch))[0]), net(batch))
