"""QDQ graphs: files for ONNX Runtime and ExecuTorch agree with the fake-quantized module."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_light.errors import TraceError
from lightning_light.example_input import ExampleInput
from lightning_light.export import ONNX, ExecuTorch, Exporter, Tolerance, export_model
from lightning_light.int8 import QDQConstraints, quantizers_of
from lightning_light.quantization import DynamicObserver, Int8, IntN, Recipe, fake_quantized, quantize
from lightning_light.quantization.lowering.base import fold
from lightning_light.quantization.specs import WeightSpec
from tests.quantization.helpers import calibrated
from tests.zoo import ZOO, noise

FAST = {"plain"}
ONE_ONLY = {"chunk", "gru", "lstm"}  # ExecuTorch builds the batch size in, as in float


def zoo(*left_out: str) -> list[Any]:
    names = sorted(ZOO.keys() - {"control_flow", *left_out})
    return [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in names]


def exported(name: str, exporter: Exporter, folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    net = ZOO[name]().eval()
    args, kwargs = net.example
    quantizer = calibrated(net, ExampleInput(args, kwargs))
    report = export_model(
        net,
        ExampleInput(args, kwargs),
        folder / f"net{exporter.suffix}",
        exporter=exporter,
        parity=Tolerance(quant_steps=3),
        latency_runs=1,
        **options,
    )
    assert quantizer.lowering is None
    assert quantizer.enabled
    assert report.details["int8_layers"] == len(quantizer.plan.layers)
    assert report.details["left_float"] == {}
    return report


@pytest.mark.parametrize("name", list(ZOO))
def test_the_graph_agrees_with_the_module(name) -> None:
    """Up to one quantization step of the output, since a batch norm is folded into its layer."""
    torch.manual_seed(0)
    net = ZOO[name]().eval()
    args, kwargs = net.example
    quantizer = calibrated(net, ExampleInput(args, kwargs))
    with torch.no_grad():
        expected = [leaf for leaf in tree_leaves(net(*args, **kwargs)) if isinstance(leaf, Tensor)]
        with quantizer.qdq(lambda: net(*args, **kwargs), QDQConstraints("xnnpack", signed=True)) as lowered:
            found = [leaf for leaf in tree_leaves(net(*args, **kwargs)) if isinstance(leaf, Tensor)]
        again = [leaf for leaf in tree_leaves(net(*args, **kwargs)) if isinstance(leaf, Tensor)]
    steps = tree_leaves(lowered.output_scales)
    for right, one, step in zip(expected, found, steps, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-5, atol=1.01 * float(step) + 1e-5)
    assert all(map(torch.equal, expected, again))


@pytest.mark.parametrize("name", zoo())
def test_onnx(name, tmp_path) -> None:
    operators = exported(name, ONNX(), tmp_path).details["operators"]
    assert {"QuantizeLinear", "DequantizeLinear"} <= set(operators)


@pytest.mark.parametrize("name", zoo())
def test_executorch(name, tmp_path) -> None:
    report = exported(name, ExecuTorch(), tmp_path, batch="one" if name in ONE_ONLY else "any")
    assert report.details["delegates"]


def test_weights_are_bytes_in_the_file(tmp_path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 128, 3), nn.ReLU(), nn.Conv2d(128, 32, 3)).eval()
    images = noise(2, 3, 8, 8)
    plain = export_model(net, (images,), tmp_path / "net.onnx", exporter=ONNX(), latency_runs=1)
    calibrated(net, ExampleInput((images,)))
    small = export_model(net, (images,), tmp_path / "net.onnx", exporter=ONNX(), latency_runs=1)
    assert small.bytes < 0.3 * plain.bytes
    assert b"test_pairs" not in (tmp_path / "net.onnx").read_bytes()  # no path of the user's code


@pytest.mark.parametrize("exporter", [ONNX(), ExecuTorch()], ids=str)
def test_a_branch_on_values_is_refused_by_name(exporter, tmp_path) -> None:
    net = ZOO["control_flow"]().eval()
    calibrated(net, ExampleInput(*net.example))
    with pytest.raises(TraceError, match=r"on `ControlFlow`: .*a branch, a loop or a size that does"):
        export_model(net, net.example[0], tmp_path / f"m{exporter.suffix}", exporter=exporter, latency_runs=1)
    assert torch.overrides._get_current_function_mode() is None  # `torch.export` runs no hook when it fails
    compiled: list[int] = []
    torch.compile(lambda x: x + 1, backend=lambda graph, _: compiled.append(1) or graph.forward)(noise(2))
    assert compiled


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (Int8(exclude=["fc"]), "excluded by the recipe"),
        (IntN(weights=4, activations=4), "no runtime has a kernel for activations of 4 bits"),
        (IntN(weights=8, activations=None), "only its weight is quantized"),
        (IntN(weights=8, observer=DynamicObserver()), "quantized dynamically"),
    ],
    ids=str,
)
def test_what_a_runtime_lacks_stays_float_and_is_listed(recipe: Recipe, reason, tmp_path) -> None:
    net, images = ZOO["plain"]().eval(), noise(2, 3, 8, 8)
    calibrated(net, ExampleInput((images,)), recipe)
    with pytest.warns(UserWarning, match=r"`ONNX\(.*stay float: .*" + reason):
        report = export_model(net, (images,), tmp_path / "net.onnx", exporter=ONNX(), latency_runs=1)
    assert reason in report.details["left_float"]["fc"]


@pytest.mark.slow
def test_kernels_of_executorch_that_were_loaded_before_are_not_taken_for_the_operations() -> None:
    """In a process that has run a float file."""
    code = (
        "import importlib, torch; importlib.import_module('executorch.kernels.quantized')\n"
        "from lightning_light.quantization.lowering.qdq import register_operations\n"
        "operation = torch.ops.quantized_decomposed.quantize_per_tensor\n"
        "before = hasattr(operation, 'default'); register_operations(); print(before, hasattr(operation, 'default'))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "True"]


def test_a_file_that_executorch_does_not_load_is_refused(tmp_path) -> None:
    """XNNPACK takes the padding of `Unfold` between int8 and float, and cannot prepare it."""
    net, images = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Unfold(2)).eval(), noise(2, 3, 8, 8)
    calibrated(net, ExampleInput((images,)))
    with pytest.raises(TraceError, match=r"`ExecuTorch`: expected a file that its runtime loads, found that it does"):
        export_model(net, (images,), tmp_path / "net.pte", exporter=ExecuTorch(), batch="one", latency_runs=1)
    assert not list(tmp_path.iterdir())


GROWING = """
import sys, torch
import lightning_light as ll
from torch import nn

torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 512, 1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(512, 8, 1), nn.Flatten()).eval()
images = torch.randn(8, 3, 8, 8)
with ll.fake_quantized(ll.quantize(net, images, ll.Int8())):
    ll.export_model(net, (images[:1],), sys.argv[1], exporter=ll.ExecuTorch(), latency_runs=1)
file = ll.load_exported(sys.argv[1], exporter=ll.ExecuTorch())
alone = torch.cat([file(image) for image in images.split(1)])
print(*[float((file(images[:size]) - alone[:size]).abs().max()) for size in (8, 3, 8)])
"""


@pytest.mark.slow
def test_an_executorch_file_with_a_mean_stands_batches_that_grow(tmp_path) -> None:
    """XNNPACK's mean of int8 writes past its memory then. In a process of its own, which that stops."""
    command = [sys.executable, "-c", GROWING, str(tmp_path / "net.pte")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert max(map(float, found.stdout.splitlines()[-1].split())) < 1e-5


def test_an_operation_that_writes_into_its_input_is_followed() -> None:
    """What was known of the tensor before holds no longer."""

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.hardswish(self.first(x), inplace=True)
            return self.second(x.mul_(2.0))

    net, images = Writes().eval(), noise(2, 3, 8, 8)
    quantizer = calibrated(net, ExampleInput((images,)))
    with torch.no_grad():
        right = net(images)
        with quantizer.qdq(lambda: net(images), QDQConstraints("xnnpack", signed=False)) as lowered:
            torch.testing.assert_close(net(images), right, rtol=1e-5, atol=1.01 * float(lowered.output_scales))


def test_the_quantizer_at_work_is_found_in_the_compression_state() -> None:
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), nn.Conv2d(4, 4, 1)).eval()
    images = noise(2, 3, 8, 8)
    quantize(net, images, Int8())
    assert quantizers_of(net) == []
    with fake_quantized(net):
        (quantizer,) = quantizers_of(nn.Sequential(net))  # also in a module that wraps it
        assert quantizer.enabled
        with pytest.warns(UserWarning, match="found no lowering.*not a part of it"):
            torch.export.export(net[0], (images,))
    assert quantizers_of(net) == []


def test_float_weights_are_released_as_they_are_folded_except_those_that_others_read() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.middle, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.middle(self.first(x)).relu()) + self.last.weight.sum(0)

    net, x = Tied().eval(), noise(4, 6)
    quantizer, constraints = calibrated(net, ExampleInput((x,))), QDQConstraints("onnxruntime", signed=False)
    with torch.no_grad():
        with quantizer.qdq(lambda: net(x), constraints):
            kept = net(x)
        with quantizer.qdq(lambda: net(x), constraints, release_weights=True):
            assert net(x).equal(kept)
    assert [layer.weight.numel() for layer in (net.first, net.middle, net.last)] == [0, 0, 36]


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_weight_is_rounded_by_pieces_of_rows_as_it_is_in_one(per_channel, monkeypatch) -> None:
    weight = torch.randn(7, 5) * torch.logspace(-12, 0, 7)[:, None]
    layer = {"weight": weight, "bias": torch.randn(7)}, None, WeightSpec(8, per_channel=per_channel), None, 1e-3, 1.0
    whole = fold(*layer).integers
    monkeypatch.setattr("lightning_light.quantization.lowering.base._PIECE", 12)
    assert fold(*layer).integers.equal(whole)
