"""Files follow the plan, also for forms of an operator that only look quantizable."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_light.example_input import ExampleInput
from lightning_light.export import ONNX, ExecuTorch, Exporter, TorchScriptLite, export_model
from lightning_light.int8 import QDQConstraints
from lightning_light.quantization.fake_quantizer import FakeQuantizer
from lightning_light.quantization.op_calls import OpId
from tests.quantization.helpers import calibrated, in_turn
from tests.zoo import noise, tokens

EXPORTERS: list[Exporter] = [TorchScriptLite(), ONNX(), ExecuTorch(), ExecuTorch(partitioner=None)]


class Tagger(nn.Module):
    """A layer reads one of the tensors that an LSTM gives."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(11, 6), nn.LSTM(6, 8, batch_first=True)
        self.head, self.state = nn.Linear(8, 5), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, (_, cell) = self.rnn(self.embedding(x))
        return self.head(y), self.state(cell[0])


class OverTime(nn.Module):
    """A mean that no int8 kernel computes, before a layer, and before a float operator."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 8, 3), nn.LayerNorm(8)
        self.head, self.other = nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(self.conv(x))
        return self.head(y.mean(-1)), self.other(self.norm(y.mean(-1)))


class PaddedWithNine(nn.Module):
    """The padding value is outside of the quantized range."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(x)
        return self.second(y), F.pad(y, (1, 1, 1, 1), value=9.0)


class Highest(nn.Module):
    """A layer reads values that are returned together with their integer indices."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        highest, _ = F.gelu(self.first(x)).max(1)
        return self.second(highest)


NETS = {
    "highest": (Highest, lambda: noise(2, 7, 6)),
    "tagger": (Tagger, lambda: tokens(2, 6, below=11)),
    "over time": (OverTime, lambda: noise(2, 2, 12)),
    "padded with nine": (PaddedWithNine, lambda: noise(2, 3, 8, 8)),
}


def prepared(name: str) -> tuple[nn.Module, Tensor, FakeQuantizer]:
    torch.manual_seed(0)
    kind, example = NETS[name]
    net, x = kind().eval(), example()
    return net, x, calibrated(net, ExampleInput((x,)))


@pytest.mark.parametrize("name", NETS)
def test_the_graph_agrees_with_the_module(name) -> None:
    net, x, quantizer = prepared(name)
    with torch.no_grad():
        expected = tree_leaves(net(x))
        with quantizer.qdq(lambda: net(x), QDQConstraints("xnnpack", signed=True)) as lowered:
            found = tree_leaves(net(x))
    for right, one, scale in zip(expected, found, tree_leaves(lowered.output_scales), strict=True):
        step = float(scale) or float(right.max() - right.min()) / 255
        torch.testing.assert_close(one, right, rtol=1e-5, atol=1.01 * step)
    assert lowered.left_float == {}


@pytest.mark.parametrize(
    ("name", "exporter"), [*in_turn([*NETS], EXPORTERS), *in_turn([*NETS], EXPORTERS[1:])], ids=str
)
def test_every_file_agrees_with_the_module(name, exporter, tmp_path) -> None:
    net, x, quantizer = prepared(name)
    report = export_model(net, (x,), tmp_path / f"net{exporter.suffix}", exporter=exporter, batch="one", latency_runs=1)
    assert report.details["left_float"] == {}
    assert report.details["int8_layers"] == len(quantizer.plan.layers)
    assert max(report.parity.quant_steps.values()) < 1.01


def test_a_layer_that_reads_what_was_never_observed_stays_float(tmp_path) -> None:
    """XNNPACK accepts such a layer with an int8 weight, and computes wrong values."""
    net, x, quantizer = prepared("over time")
    quantizer.qparams[quantizer.plan.layers[OpId("head", 1, "linear", 1)].input] = None
    with pytest.warns(UserWarning, match="stay float: {'head': 'its input was never observed'}"):
        report = export_model(net, (x,), tmp_path / "net.pte", exporter=ExecuTorch(), batch="one", latency_runs=1)
    assert max(report.parity.quant_steps.values()) < 1.01
