"""Cross-layer equalization against the formulas of Nagel et al. (2019), restated here in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_light.example_input import ExampleInput
from lightning_light.quantization.post_training.equalization import equalize, equalizing_scales, find_pairs
from lightning_light.quantization.trace import trace_ops, writable_parameters
from tests.zoo import ZOO, Net, noise


def pairs_of(net: Net) -> list[tuple[str, str | None, str, int]]:
    net.eval()
    args, kwargs = net.example
    trace = trace_ops(net, args, kwargs)
    found = find_pairs(trace.nodes, writable_parameters(net, trace))
    return [
        (pair.first.id.module, pair.batch_norm and pair.batch_norm.id.module, pair.second.id.module, pair.columns)
        for pair in found
    ]


def trained(net: Net) -> Net:
    """Statistics and scales as after training: far apart, of both signs."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 2)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) * 5 + 0.01)
    return net.eval()


class MobileBlocks(Net):
    """Pointwise, depthwise, pointwise, with plain ReLUs; then a leaky one, pooling and flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.project, self.bn3 = nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.grouped = nn.Conv2d(6, 4, 3, groups=2)
        self.fc1, self.fc2 = nn.Linear(4 * 9, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.expand(x)))
        x = F.relu(self.bn2(self.depthwise(x)))
        x = F.leaky_relu(self.grouped(self.bn3(self.project(x))))
        x = F.max_pool2d(x, 2).flatten(1)
        return self.fc2(F.dropout(F.relu_(self.fc1(x)), 0.5, self.training))


def test_one_pair_is_the_papers_formula() -> None:
    """Equations 8 to 11: ``W1 / s``, ``b1 / s``, ``W2 s`` ``s_i = sqrt(r1_i r2_i) / r2_i``; both ranges then agree."""
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    w1, b1, w2 = net[0].weight.detach().clone(), net[0].bias.detach().clone(), net[2].weight.detach().clone()
    r1, r2 = w1.abs().max(1).values, w2.abs().max(0).values
    s = (r1 * r2).sqrt() / r2
    assert equalize(net, ExampleInput((noise(2, 5).double(),))) == 1
    torch.testing.assert_close(net[0].weight.detach(), w1 / s[:, None], rtol=1e-12, atol=0)
    torch.testing.assert_close(net[0].bias.detach(), b1 / s, rtol=1e-12, atol=0)
    torch.testing.assert_close(net[2].weight.detach(), w2 * s, rtol=1e-12, atol=0)
    torch.testing.assert_close(net[0].weight.abs().amax(1), net[2].weight.abs().amax(0), rtol=1e-12, atol=0)


def test_dead_channels_are_left_alone() -> None:
    assert equalizing_scales(torch.tensor([0.0, 4.0, 9.0]), torch.tensor([1.0, 0.0, 1.0])).tolist() == [1.0, 1.0, 3.0]


def test_batch_norm_takes_the_scale_and_its_folded_weight_counts() -> None:
    net = trained(MobileBlocks()).double()
    folded = torch.nn.utils.fuse_conv_bn_eval(net.expand, net.bn1).weight.abs().amax((1, 2, 3))
    kernels = net.depthwise.weight.abs().amax((1, 2, 3))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert folded.max() / folded.min() > 3
    equalize(net, ExampleInput((net.example[0][0].double(),)))
    for name in ("expand.weight", "bn1.running_mean", "bn1.running_var"):
        assert torch.equal(before[name], net.state_dict()[name]), "only the affine part moves"
    folded_after = torch.nn.utils.fuse_conv_bn_eval(net.expand, net.bn1).weight.abs().amax((1, 2, 3))
    torch.testing.assert_close(folded_after, net.depthwise.weight.abs().amax((1, 2, 3)), rtol=1e-3, atol=0)
    assert not torch.allclose(kernels, net.depthwise.weight.abs().amax((1, 2, 3)))


def test_pairs_of_depthwise_grouped_and_flattened_layers() -> None:
    assert pairs_of(MobileBlocks()) == [
        ("expand", "bn1", "depthwise", 1),
        ("depthwise", "bn2", "project", 1),
        ("project", "bn3", "grouped", 1),
        ("grouped", None, "fc1", 9),
        ("fc1", None, "fc2", 1),
    ]


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("plain", [("conv1", "bn1", "conv2", 1), ("conv2", "bn2", "fc", 1)]),
        ("residual", []),  # every sum has two makers
        ("padded_shortcut", [("conv1", "bn1", "conv2", 1)]),
        ("depthwise", []),  # ReLU6
        ("reshape_flatten", [("conv1", None, "conv2", 1), ("conv2", None, "fc1", 16), ("fc1", None, "fc2", 1)]),
        ("transposed", [("down", "bn1", "up", 1), ("up", "bn2", "head", 1)]),
        ("reused", [("last", None, "fc", 1)]),  # not the layer that is called twice
    ],
)
def test_pairs_of_nets_of_the_zoo(name, pairs) -> None:
    assert pairs_of(ZOO[name]()) == pairs


@pytest.mark.parametrize("make", [*ZOO.values(), MobileBlocks], ids=[*ZOO, "mobile_blocks"])
def test_the_function_stays_to_float_rounding(make) -> None:
    net = trained(make()).double()
    args, kwargs = copy.deepcopy(net.example)
    example = ExampleInput(args, kwargs).to(net)
    with torch.no_grad():
        right = net(*example.args, **example.kwargs)
        equalize(net, example)
        torch.testing.assert_close(net(*example.args, **example.kwargs), right, rtol=1e-9, atol=1e-9)
