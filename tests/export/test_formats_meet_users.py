"""What users' networks are like: memory formats, types and Python functions that a format does not know."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_light.errors import TraceError
from lightning_light.example_input import ExampleInput
from lightning_light.export import ONNX, ExecuTorch, TorchScriptLite, export_model
from lightning_light.export.executorch import _Refusing
from lightning_light.export.inputs import Positional
from lightning_light.quantization import Int8, fake_quantized, quantize
from tests.zoo import ZOO, noise

IMAGES = noise(2, 3, 8, 8)


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()


@pytest.mark.parametrize("images", [IMAGES, IMAGES.to(memory_format=torch.channels_last)], ids=["plain", "last"])
def test_executorch_exports_channels_last_networks(images, tmp_path) -> None:
    net = two_layers().to(memory_format=torch.channels_last)
    before = [parameter.stride() for parameter in net.parameters()]
    report = export_model(net, (images,), tmp_path / "net.pte", exporter=ExecuTorch(), latency_runs=1)
    assert report.parity.max_absolute < 1e-5
    assert [parameter.stride() for parameter in net.parameters()] == before


def test_executorch_runs_on_permuted_inputs(tmp_path) -> None:
    net, images = two_layers(), noise(2, 8, 8, 3).permute(0, 3, 1, 2)
    report = export_model(net, (images,), tmp_path / "net.pte", exporter=ExecuTorch(), latency_runs=1)
    assert report.parity.max_absolute < 1e-5


def test_onnx_runtime_has_no_kernels_for_float64(tmp_path) -> None:
    with pytest.raises(TraceError, match=r"`ONNX\(\)`: expected operations .*kernels for, found .*`model\.float\(\)`"):
        export_model(ZOO["plain"]().double(), (IMAGES.double(),), tmp_path / "net.onnx", exporter=ONNX())
    assert not list(tmp_path.iterdir())


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient


class Squares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return Square.apply(self.fc(x))  # type: ignore[no-untyped-call, no-any-return]


def test_an_autograd_function_is_refused_for_the_lite_interpreter_only(tmp_path) -> None:
    net, x = Squares().eval(), noise(2, 3)
    with pytest.raises(TraceError, match=r"`TorchScriptLite\(.*on `Squares`: .*Python function `Square`.*`ONNX\(\)`"):
        export_model(net, (x,), tmp_path / "net.ptl", exporter=TorchScriptLite())
    assert not list(tmp_path.iterdir())
    assert export_model(net, (x,), tmp_path / "net.onnx", exporter=ONNX(), latency_runs=1).parity.max_absolute < 1e-5


def test_exceptions_of_executorch_become_trace_errors() -> None:
    model = Positional(Squares(), ExampleInput((noise(2, 3),)))
    refusing = _Refusing("ExecuTorch()", model)
    with pytest.raises(TraceError, match=r"`ExecuTorch\(\)` on `Squares`: .*found KeyError: 'why'"), refusing:
        raise Exception("An error occurred when running the 'Some' pass") from KeyError("why")
    with pytest.raises(KeyboardInterrupt), _Refusing("ExecuTorch()", model):
        raise KeyboardInterrupt


class Attends(nn.Module):
    """Attention in one dimension fewer, or one more, than the usual four: a single head, or windows."""

    def __init__(self, windows: bool, masked: bool) -> None:
        super().__init__()
        self.windows, self.masked = windows, masked
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.windows:
            q, k, v = (part.view(x.shape[0], -1, 4, 2, 4).transpose(2, 3) for part in (q, k, v))
        mask = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril() if self.masked else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not self.masked)
        return self.head((y.transpose(2, 3) if self.windows else y).reshape(x.shape)).mean(1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("windows", [False, True])
def test_onnx_has_attention_over_any_dimensions(windows, masked, tmp_path) -> None:
    torch.manual_seed(0)
    net = Attends(windows, masked).eval()
    report = export_model(net, (noise(2, 16, 8),), tmp_path / "net.onnx", latency_runs=1)
    assert report.parity.max_absolute < 1e-5
    assert report.parity.batches == 3


class Decoder(nn.Module):
    """Compares the batch size with one and reads by index, as the masks of transformers' decoders do while traced."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        offset.mul_(1.0)  # an input without a batch that is written to
        positions = torch.arange(x.shape[1]).unsqueeze(0)
        if positions.shape[0] != x.shape[0]:
            positions = positions.expand(x.shape[0], -1)
        rows = torch.arange(x.shape[0])[:, None]
        known = positions[rows, torch.arange(x.shape[1])[None]].unsqueeze(-1) >= 2
        return self.last(self.first(x) * known) + offset


@pytest.mark.parametrize("quantized", [False, True])
def test_a_trace_takes_the_side_of_several_samples(quantized, tmp_path) -> None:
    torch.manual_seed(0)
    net, x, offset = Decoder().eval(), noise(3, 5, 4), torch.ones(4)
    if quantized:
        quantize(net, (x, offset), Int8(), data=[ExampleInput((x, offset))], progress_bar=False)
    with torch.no_grad(), fake_quantized(net) if quantized else nullcontext():
        with pytest.warns(UserWarning, match="Python values that were taken from tensors"):
            report = export_model(net, (x, offset), tmp_path / "net.ptl", batch="any", latency_runs=1)
        right = net(x, offset)
    assert report.parity.batches == 3
    run = TorchScriptLite().load(tmp_path / "net.ptl")
    for size in (1, 2, 3):
        torch.testing.assert_close(run(x[:size], offset), right[:size], atol=0.05 if quantized else 1e-6, rtol=0)


class Flattening(nn.Module):
    """Flattens samples and tokens with ``view``, as the layers of GPT-2 do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.bias, self.weight = nn.Linear(8, 24), nn.Parameter(noise(3)), nn.Parameter(noise(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.view(x.shape[0], -1, 2, 4).transpose(1, 2) for part in self.qkv(x).split(8, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape).contiguous()
        return torch.addmm(self.bias, y.view(-1, 8), self.weight).view(*x.shape[:2], 3)


@pytest.mark.parametrize("exporter", [ONNX(), ExecuTorch(), TorchScriptLite()], ids=str)
def test_attention_may_be_viewed(exporter, tmp_path) -> None:
    torch.manual_seed(0)
    path = tmp_path / f"net{exporter.suffix}"
    report = export_model(Flattening().eval(), (noise(2, 6, 8),), path, exporter=exporter, latency_runs=1)
    assert report.parity.max_absolute < 1e-5
    assert report.parity.batches == 3
