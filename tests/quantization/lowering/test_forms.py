"""Forms of layers and casts that need care: each runtime's file computes what the fake-quantized module does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends import quantized

from lightning_light.example_input import ExampleInput
from lightning_light.export import ONNX, ExecuTorch, TorchScriptLite, export_model
from lightning_light.export.exporter import Exporter
from lightning_light.quantization import Int8
from tests.quantization.helpers import calibrated, in_turn
from tests.zoo import noise

ENGINES = {"qnnpack", "x86"} & set(quantized.supported_engines)
EXPORTERS: dict[str, Exporter] = {"lite": TorchScriptLite(), "onnx": ONNX(), "executorch": ExecuTorch()}


class OverTokens(nn.Module):
    """A batch norm that counts tokens, after a layer that counts features."""

    def __init__(self, tokens: int, features: int = 6) -> None:
        super().__init__()
        self.layer, self.bn, self.head = nn.Linear(features, features), nn.BatchNorm1d(tokens), nn.Linear(features, 3)
        with torch.no_grad():
            for place, tensor in enumerate((self.bn.weight, self.bn.bias, self.bn.running_mean, self.bn.running_var)):
                tensor.copy_(noise(5, tokens)[place].abs() + 0.3)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(self.layer(x)).relu().mean(1))


class Volumes(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.first = nn.Conv3d(2, 4, 3, padding=1)
        self.second = nn.ConvTranspose3d(4, 4, 2, 2) if transposed else nn.Conv3d(4, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3, 4)))


class Casts(nn.Module):
    """Casts to the type of another tensor, as in code for mixed precision."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = self.second(h.to(x.dtype)).to(h.dtype).type(h.dtype)
        signs = (y.type_as(h) > 0).to(h.dtype) if h.is_floating_point() else y
        return self.head(y.type(h.type()) + h) * signs.to(torch.int64).to(h.dtype).mean(-1, keepdim=True)


class Windows(nn.Module):
    """Pads to whole windows before a residual sum; its sizes are numbers, but tensors while it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = (
            nn.Conv2d(3, 6, 3, padding=1),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.Linear(6, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[2:]
        below, right = (4 - rows % 4) % 4, (4 - columns % 4) % 4
        x = self.first(F.pad(x, (0, right, 0, below)))
        whole = x.view(x.shape[0], x.shape[1], (rows + below) // 4, 4, columns + right).flatten(2, 3)
        return self.head((x + self.second(whole).relu()).mean((2, 3)))


def compared(net: nn.Module, x: Tensor, exporter: Exporter, folder: Path, engine: Any = "qnnpack") -> dict[str, Any]:
    """Details of a file that is two steps from the module at most, which itself is near to the float network."""
    with torch.no_grad():
        right = net.eval()(x)
        calibrated(net, ExampleInput((x,)), Int8(engine=engine))
        assert float((net(x) - right).abs().max()) < 0.05 * float(right.abs().max())
    report = export_model(net, (x,), folder / f"net{exporter.suffix}", exporter=exporter, latency_runs=1)
    assert max(report.parity.quant_steps.values()) <= 2.0
    return report.details


@pytest.mark.parametrize(("runtime", "tokens"), in_turn(list(EXPORTERS), [6, 4]))
def test_a_batch_norm_is_folded_only_into_a_layer_whose_outputs_it_counts(runtime, tokens, tmp_path) -> None:
    details = compared(OverTokens(tokens), noise(5, tokens, 6), EXPORTERS[runtime], tmp_path)
    assert details["int8_layers"] == 2


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_convolutions_in_three_dimensions_are_float_where_the_engine_has_none(engine, transposed, tmp_path) -> None:
    net, x = Volumes(transposed), noise(2, 2, 4, 6, 6)
    is_float = {"first", "second"} if engine == "qnnpack" else {"second"} if transposed else set()
    if not is_float:
        details = compared(net, x, TorchScriptLite(), tmp_path, engine)
    else:
        with pytest.warns(UserWarning, match="layers that stay float: {'(first|second)'"):
            details = compared(net, x, TorchScriptLite(), tmp_path, engine)
    assert set(details["left_float"]) == is_float
    assert details["int8_layers"] == 3 - len(is_float)


@pytest.mark.parametrize("runtime", EXPORTERS)
def test_arithmetic_on_sizes_is_no_operator(runtime, tmp_path) -> None:
    details = compared(Windows(), noise(2, 3, 7, 6), EXPORTERS[runtime], tmp_path)
    assert details["int8_layers"] == 3
    assert not details["left_float"]


@pytest.mark.parametrize("runtime", EXPORTERS)
def test_casts_to_the_type_of_another_tensor(runtime, tmp_path) -> None:
    details = compared(Casts(), noise(5, 6), EXPORTERS[runtime], tmp_path)
    assert details["int8_layers"] == 3
    assert not details["left_float"]


CLAMPS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu in place": nn.ReLU(inplace=True),
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "clamp": lambda x: x.clamp(min=-0.3),
    "clamp in place": lambda x: x.clamp_(-0.2, 0.3),
}


class Clamps(nn.Module):
    """Clamps between pools, which keep quantization parameters, and layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.heads = nn.ModuleList(nn.Conv2d(6, 4, 1) for _ in CLAMPS)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.first(x)
        return [head(clamp(F.max_pool2d(x, 2))) for head, clamp in zip(self.heads, CLAMPS.values(), strict=True)]


@pytest.mark.parametrize("runtime", EXPORTERS)
def test_a_clamp_after_a_pool_has_the_range_of_its_result(runtime, tmp_path) -> None:
    torch.manual_seed(0)
    net, x = Clamps().eval(), 4 * noise(2, 3, 8, 8)
    calibrated(net, ExampleInput((x,)))
    exporter = EXPORTERS[runtime]
    report = export_model(net, (x,), tmp_path / f"net{exporter.suffix}", exporter=exporter, latency_runs=1)
    assert report.details["int8_layers"] == len(CLAMPS) + 1
    assert max(report.parity.quant_steps.values()) <= 2.0
