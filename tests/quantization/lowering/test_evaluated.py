"""A rounded network that is evaluated computes what the int8 kernels do, number for number."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_light.example_input import ExampleInput
from lightning_light.export import ONNX, ExecuTorch, Exporter, Tolerance, TorchScriptLite, export_model
from lightning_light.export.copies import detached_copy
from lightning_light.int8 import QUANTIZED_TENSORS_ARE_DEPRECATED
from lightning_light.quantization import Int8
from lightning_light.quantization.lowering import kernels
from lightning_light.quantization.lowering.sums import in_whole_numbers, kernels_of
from lightning_light.quantization.lowering.weights import folded
from lightning_light.quantization.rules import WeightRule
from tests.quantization.test_plan import calibrated
from tests.zoo import noise


class Branches(nn.Module):
    """A free batch norm, a sum that begins with 0, a product with a gate, a concatenation, means that are halves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.left, self.right = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.norm = nn.BatchNorm2d(channels)
        self.gate, self.join = nn.Conv2d(channels, channels, 1), nn.Conv2d(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x).relu()
        x = sum([self.left(x).relu(), self.right(x)])
        x = x * self.gate(x).sigmoid()
        x = self.join(torch.cat([x, self.left(x)], 1)) + x
        return F.avg_pool2d(x, 2)


def deep() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs, stride, groups in ((3, 32, 2, 1), (32, 32, 1, 32), (32, 64, 1, 1), (64, 64, 2, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups, bias=groups > 1), nn.BatchNorm2d(outputs)]
        layers += [nn.ReLU()]
    return settled(nn.Sequential(*layers, Branches(64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)))


def wide() -> nn.Sequential:
    """So many numbers that one of them is near to a half wherever it can be."""
    return settled(nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), Branches(24)))


def settled(net: nn.Sequential) -> nn.Sequential:
    """Batch norms with statistics and gains of their own, some of them negative."""
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    with torch.no_grad():
        net.train()(noise(16, 3, 32, 32))
    return net.eval()


@pytest.mark.parametrize("exporter", [TorchScriptLite(), TorchScriptLite("x86"), ONNX(), ExecuTorch()], ids=repr)
@pytest.mark.parametrize(("made", "size"), [(deep, 32), (wide, 80)])
def test_a_file_answers_as_the_module_in_every_bit(exporter: Exporter, made, size, tmp_path) -> None:
    engine = "x86" if exporter == TorchScriptLite("x86") else "qnnpack"
    if engine == "x86" and not torch.cpu._is_vnni_supported():
        pytest.skip("torch gives convolutions to another library on processors without VNNI")
    net, images = made(), noise(8, 3, size, size)
    calibrated(net, ExampleInput((images,)), Int8(engine=engine))
    path = tmp_path / f"net{exporter.suffix}"
    report = export_model(net, (images,), path, exporter=exporter, parity=Tolerance(quant_steps=0.01), latency_runs=1)
    assert report.details["left_float"] == {}
    run = exporter.load(path)
    batches = [torch.randn(8, 3, size, size) for _ in range(4)]
    with torch.no_grad():
        assert all(torch.equal(torch.as_tensor(tree_leaves(run(batch))[0]), net(batch)) for batch in batches)


@pytest.mark.filterwarnings(f"ignore:{QUANTIZED_TENSORS_ARE_DEPRECATED}")
@pytest.mark.parametrize("groups", [1, 16])
def test_a_layer_is_the_kernel(groups, monkeypatch) -> None:
    """s_y * clamp(round(s_x s_w / s_y * (sum + bias)), -z, 255 - z), on torch's int8 kernel and in float64."""
    torch.manual_seed(0)
    layer, reads, writes = nn.Conv2d(16, 64, 3, padding=1, groups=groups), (0.0123, 100), (0.0456, 120)
    reads, writes = ((float(torch.tensor(scale)), zero) for scale, zero in (reads, writes))
    whole = torch.randint(-100, 156, (4, 16, 20, 20)).float()
    named = {"input": whole * reads[0], "weight": layer.weight, "bias": layer.bias, "padding": 1, "groups": groups}
    with torch.no_grad():
        weight = folded(named, None, WeightRule(), None, reads[0], writes[0])
        args = [named["input"], layer.weight, layer.bias, 1, 1, 1, groups]
        found = in_whole_numbers(F.conv2d, args, {}, weight, reads, writes, 255)
        monkeypatch.setattr(torch.backends.quantized, "engine", "qnnpack")
        zeros = torch.zeros(64, dtype=torch.int64)
        kernel = kernels.Layer.of(
            "conv2d", weight.with_whole_bias(reads[0]), named, relu=False, scale=writes, zeros=zeros
        )
        right = kernel(kernels.quantize(named["input"], reads)).dequantize()
        unit = (weight.scale * reads[0]).reshape(-1, 1, 1)
        bias = torch.round(weight.bias.double() / unit.flatten())  # type: ignore[union-attr]
        sums = F.conv2d(whole.double(), weight.integers.double(), bias, padding=1, groups=groups)
        exact = (sums * unit / writes[0]).round().clamp(-writes[1], 255 - writes[1]) * writes[0]
    assert torch.equal(found, right)
    assert float((found - exact).abs().max()) < 1e-5, "no number of these is that near to a half"


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="convolutions are computed by another library")
@pytest.mark.filterwarnings(f"ignore:{QUANTIZED_TENSORS_ARE_DEPRECATED}")
@pytest.mark.parametrize(("name", "groups"), [("conv2d", 1), ("conv2d", 4), ("conv2d", 128), ("linear", 1)])
def test_a_layer_is_the_kernel_of_x86_where_half_of_the_results_are_halves(name, groups, monkeypatch) -> None:
    """oneDNN: round((sum s_x s_w + bias) / s_y + z) - z; FBGEMM: round((sum + bias / (s_x s_w)) (s_x s_w / s_y))."""
    monkeypatch.setattr(torch.backends.quantized, "engine", "x86")
    torch.manual_seed(0)
    for trial in range(12):
        layer: Any = nn.Conv2d(128, 128, 3, padding=1, groups=groups) if name == "conv2d" else nn.Linear(128, 128)
        step = float(torch.rand(()) * 0.01 + 0.001)
        layer.weight.data = torch.randint(-62, 63, layer.weight.shape) * step
        layer.weight.data.flatten(1)[:, 0] = 63 * step
        reads = float(torch.rand(())) * 0.1 + 0.01, 100
        writes = reads[0] * step * 2.0 ** (trial % 4 + 7), 120
        reads, writes = ((float(torch.tensor(scale)), zero) for scale, zero in (reads, writes))
        layer.bias.data = torch.randint(-500, 500, (128,)) * reads[0] * step
        whole = torch.randint(-100, 156, (2, 128, 12, 12) if name == "conv2d" else (300, 128)).float()
        named = {"input": whole * reads[0], "weight": layer.weight, "bias": layer.bias}
        named |= {"padding": 1, "groups": groups} if name == "conv2d" else {}
        with torch.no_grad():
            weight = folded(named, None, WeightRule(low=-63, high=63), None, reads[0], writes[0])
            rest, whose = [1, 1, 1, groups] if name == "conv2d" else [], kernels_of("x86", name, named)
            args = [named["input"], layer.weight, layer.bias, *rest]
            found = in_whole_numbers(getattr(F, name), args, {}, weight, reads, writes, 255, whose)
            kernel = kernels.Layer.of(
                name, weight, named, relu=False, scale=writes, zeros=torch.zeros(128, dtype=torch.int64)
            )
            right = kernel(kernels.quantize(named["input"], reads)).dequantize()
        assert torch.equal(found, right)


class Scaled(nn.BatchNorm2d):
    """A batch norm that is one, and computes otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight * 2, self.bias, False, 0.0, self.eps)


def test_a_batch_norm_of_its_own_kind_is_computed_as_it_is_written() -> None:
    torch.manual_seed(0)
    own = nn.Sequential(nn.Conv2d(3, 8, 3), Scaled(8), nn.ReLU()).eval()
    usual = nn.Sequential(own[0], nn.BatchNorm2d(8), nn.ReLU()).eval()
    nn.init.constant_(usual[1].weight, 2.0)  # type: ignore[arg-type]
    images = noise(4, 3, 8, 8)
    answers = []
    for net in (own, usual):
        attachment = calibrated(net, ExampleInput((images,)))
        with torch.no_grad():
            answers.append(net(images))
        attachment.let_go()
    scale = float(attachment.scales[attachment.plan.outputs["2|1|relu|1"]][0])  # type: ignore[index]
    assert float((answers[0] - answers[1]).abs().max()) < 1.01 * scale
    assert float(answers[0].abs().max()) > 20 * scale


def test_statistics_of_the_batch_are_used_in_training_mode() -> None:
    net, images = deep(), noise(8, 3, 32, 32)
    calibrated(net, ExampleInput((images,)))
    moved = net[1].running_mean.clone()  # type: ignore[union-attr,operator]
    with torch.no_grad():
        found = net.train()(images)
    assert not torch.equal(net[1].running_mean, moved)  # type: ignore[arg-type]
    right = net.train()(images).detach()
    assert float((found - right).abs().max()) < 0.2 * float(right.abs().max())


def test_a_copy_for_export_computes_likewise() -> None:
    net, images = deep(), noise(8, 3, 32, 32)
    attachment = calibrated(net, ExampleInput((images,)))
    with torch.no_grad():
        right = net(images)
        assert torch.equal(detached_copy(net.train())(images), right)
    assert attachment.outermost is None


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Any:
        if x.shape[0] == 1:
            raise RuntimeError("in the middle")
        return x


def test_what_an_interrupted_call_has_left_is_forgotten() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), Fails(), nn.BatchNorm2d(8)).eval()
    images = noise(4, 3, 8, 8)
    attachment = calibrated(net, ExampleInput((images,)), Int8())
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="in the middle"):
            net(images[:1])
        attachment.form = "plain"
        assert torch.allclose(net(images), net[2](net[0](images)))


@pytest.mark.parametrize("exporter", [TorchScriptLite(), ONNX(), ExecuTorch()], ids=repr)
def test_a_batch_norm_that_follows_no_layer_is_one_product_and_one_sum(exporter: Exporter, tmp_path) -> None:
    net = settled(nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.BatchNorm2d(24)))
    norm, images = net[2], noise(8, 3, 32, 32)
    calibrated(net, ExampleInput((images,)))
    path = tmp_path / f"net{exporter.suffix}"
    export_model(net, (images,), path, exporter=exporter, latency_runs=1)
    with torch.no_grad():
        gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()  # type: ignore[operator,union-attr]
        shift = norm.bias.double() - norm.running_mean.double() * gain  # type: ignore[operator,union-attr]
        read: list[Tensor] = []
        net[1].register_forward_hook(lambda module, args, result: read.append(result))
        found, (x,) = net(images), read
        assert torch.equal(found, x * gain.float().reshape(-1, 1, 1) + shift.float().reshape(-1, 1, 1))
        usual = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)  # type: ignore[arg-type]
        assert not torch.equal(found, usual)
        assert torch.allclose(found, usual, atol=1e-5)
        assert torch.equal(torch.as_tensor(tree_leaves(exporter.load(path)(images))[0]), found)


def test_a_pool_that_leaves_out_the_padding_is_that_of_whole_numbers_on_qnnpack(tmp_path) -> None:
    pool = nn.AvgPool2d(3, 2, 1, count_include_pad=False)  # of four and six numbers at the border; float there
    net, images = nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), pool, nn.Conv2d(24, 8, 1)), noise(8, 3, 32, 32)
    calibrated(net.eval(), ExampleInput((images,)))
    export_model(net, (images,), tmp_path / "net.ptl", exporter=TorchScriptLite(), latency_runs=1)
    run = TorchScriptLite().load(tmp_path / "net.ptl")
    with torch.no_grad():
        assert torch.equal(torch.as_tensor(tree_leaves(run(images))[0]), net(images))
