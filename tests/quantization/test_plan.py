"""What is quantized, on every net of the zoo; and that nothing of the net changes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_light.encoding import decode, encode
from lightning_light.example_input import ExampleInput
from lightning_light.export import ONNX, export_model
from lightning_light.quantization.op_calls import OpCall, OpId
from lightning_light.quantization.operators import is_view
from lightning_light.quantization.plan import FusedOps, QuantizationPlan
from lightning_light.quantization.recipes import Int8
from lightning_light.quantization.specs import WeightSpec
from lightning_light.surgery.manifest import plain_copy
from lightning_light.targets import Targets
from tests.quantization.helpers import calibrated, decibels, in_turn, plan_of
from tests.zoo import ZOO, noise


@pytest.mark.parametrize(("name", "engine"), in_turn(list(ZOO), ["qnnpack", "x86"]))
def test_every_net_of_the_zoo_is_quantized_and_stays_close(name, engine) -> None:
    torch.manual_seed(0)
    net = ZOO[name]().eval()
    args, kwargs = net.example
    before, keys = vars(net).copy(), list(net.state_dict())
    with torch.no_grad():
        right = [leaf for leaf in tree_leaves(net(*args, **kwargs)) if isinstance(leaf, Tensor)]
        quantizer = calibrated(net, ExampleInput(args, kwargs), Int8(engine=engine))
        assert quantizer.plan.layers
        assert all(scale is not None for scale in quantizer.qparams)
        found = [leaf for leaf in tree_leaves(net(*args, **kwargs)) if isinstance(leaf, Tensor)]
        assert list(net.state_dict()) == keys
        assert min(map(decibels, right, found)) > (33 if engine == "qnnpack" else 26)
        quantizer.remove()
        again = [leaf for leaf in tree_leaves(net(*args, **kwargs)) if isinstance(leaf, Tensor)]
    assert all(map(torch.equal, right, again))
    assert {name for name in vars(net) if not name.startswith("_lightning_light")} == before.keys()
    assert not any(module._forward_hooks or len(module._forward_pre_hooks) > 1 for module in net.modules())


def test_a_block_is_quantized_where_its_kernel_ends() -> None:
    plan = plan_of(ZOO["plain"](), noise(2, 3, 8, 8))
    conv1, conv2 = OpId("conv1", 1, "conv2d", 1), OpId("conv2", 1, "conv2d", 1)
    relu1, relu2 = OpId("", 1, "relu", 1), OpId("", 1, "relu", 2)
    mean, linear = OpId("", 1, "mean", 1), OpId("fc", 1, "linear", 1)
    assert list(plan.layers) == [conv1, conv2, linear]
    assert {site.weight for site in plan.layers.values()} == {WeightSpec(8, -127, 127)}
    assert plan.layers[conv1].fused == FusedOps(relu1, OpId("bn1", 1, "batch_norm", 1), relu1)
    assert plan.layers[linear].fused == FusedOps(linear)
    assert plan.inputs == {conv1: {0: 0}}
    assert list(plan.outputs) == [relu1, relu2, mean, linear]
    assert plan.outputs[mean] == plan.outputs[relu2], "a mean keeps the quantization parameters of its input"
    assert [spec.non_negative for spec in plan.activations] == [False, True, True, False]


@pytest.mark.parametrize("name", list(ZOO))
def test_a_plan_survives_encoding(name) -> None:
    net = ZOO[name]()
    args, kwargs = net.example
    plan = plan_of(net, *args, **kwargs)
    assert decode(QuantizationPlan, plain_copy(encode(plan), "plan"), "plan") == plan


def test_a_residual_stream_that_a_norm_reads_stays_float() -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.first(x)
            return x + self.second(self.norm(x))

    plan = plan_of(Stream(), noise(2, 6))
    assert OpId("", 1, "__add__", 1) not in plan.outputs
    assert OpId("norm", 1, "layer_norm", 1) in plan.outputs


def test_transposed_convolutions_have_one_scale_and_keep_their_batch_norm() -> None:
    net = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    plan = plan_of(net, noise(2, 3, 4, 4))
    channels = {op: site.weight.per_channel for op, site in plan.layers.items()}
    assert channels == {OpId("0", 1, "conv_transpose2d", 1): False, OpId("3", 1, "conv2d", 1): True}
    assert not any(site.fused.batch_norm for site in plan.layers.values())


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
    assert [spec.upper_bound for spec in plan.activations] == [None, 6.0, 6.0, 6.0, None]


def test_layers_can_be_kept_float() -> None:
    plan = plan_of(ZOO["plain"](), noise(2, 3, 8, 8), recipe=Int8(exclude="fc"))
    assert OpId("fc", 1, "linear", 1) not in plan.layers
    assert plan.left_float == {"fc": "excluded by the recipe"}


def test_a_layer_that_is_used_twice_has_two_places() -> None:
    plan = plan_of(ZOO["reused"](), *ZOO["reused"]().example[0])
    assert {op.call for op in plan.layers} == {1, 2}


def test_keyword_arguments_and_weights_given_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(noise(4, 6))

        def forward(self, *, x: Tensor) -> Tensor:
            return F.linear(x, weight=self.w)

    net = Named()
    quantizer = calibrated(net, ExampleInput(kwargs={"x": noise(2, 6)}))
    assert quantizer.plan.inputs == {OpId("", 1, "linear", 1): {0: 0}}
    assert decibels(noise(2, 6) @ net.w.T.detach(), net(x=noise(2, 6)).detach()) > 35


def test_an_error_in_forward_leaves_no_mode_behind() -> None:
    net = ZOO["plain"]()
    quantizer = calibrated(net, ExampleInput((noise(2, 3, 8, 8),)))
    for _ in range(2):
        with pytest.raises(RuntimeError):
            net(noise(2, 4, 8, 8))
        assert quantizer.outermost is None
        assert torch.overrides._get_current_function_mode() is None
    quantizer.remove()


def test_adding_zero_keeps_quantization_parameters() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(3))
            self.last = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(sum(layer(x) for layer in self.layers) * 1)

    plan = calibrated(Branches().eval(), ExampleInput((noise(2, 3, 8, 8),))).plan
    assert OpId("", 1, "__radd__", 1) not in plan.outputs
    assert [op.function for op in plan.outputs] == ["conv2d", "conv2d", "add", "conv2d", "add", "conv2d"]


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
def test_only_a_neutral_plain_number_makes_a_view(name, other, right) -> None:
    call = OpCall(OpId("", 1, name, 1), torch.add, [torch.ones(3), other], {})
    assert is_view(call) is right


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


def test_layers_are_excluded_by_targets() -> None:
    plan = plan_of(ZOO["plain"](), noise(2, 3, 8, 8), recipe=Int8(exclude=Targets(types="Linear")))
    assert [op.module for op in plan.layers] == ["conv1", "conv2"]
    assert plan.left_float == {"fc": "excluded by the recipe"}
