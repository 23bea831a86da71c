"""Files for torch's int8 kernels agree with the fake-quantized module, and known defects of kernels are avoided."""

import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_light.errors import UnsupportedError
from lightning_light.example_input import ExampleInput
from lightning_light.export import MobileExport, Tolerance, TorchScriptLite, export_model
from lightning_light.export.torchscript_lite import quiet_deprecations
from lightning_light.quantization import (
    Int8,
    MinMax,
    MovingAverage,
    QuantizationAwareTraining,
    fake_quantized,
    quantize,
)
from lightning_light.quantization.lowering.base import QuantizedWeight
from lightning_light.quantization.lowering.quantized_ops import QuantizedOpsLowering, share_storage
from tests import zoo
from tests.contract.bodies import Body, module_class
from tests.contract.runs import DEFAULT_HOST, trainer
from tests.quantization.helpers import calibrated, in_turn
from tests.zoo import ZOO, noise

ENGINES = [
    name for name in ("qnnpack", "x86") if name in torch.backends.quantized.supported_engines
]  # a build of torch may lack one

TRANSPOSED = ["transposed", "unet"]


def exported(net: nn.Module, folder: Path, *args: Tensor, **options: Any) -> Any:
    return export_model(net, args, folder / "net.ptl", latency_runs=1, **options)


@contextmanager
def kernels_of(engine: str) -> Iterator[None]:
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


@pytest.mark.parametrize(("name", "engine"), sorted({*in_turn(list(ZOO), ENGINES), *product(TRANSPOSED, ENGINES)}))
@pytest.mark.filterwarnings("ignore:`TorchScriptLite.* on .*stay float")
@pytest.mark.filterwarnings("ignore:`TorchScriptLite.* on `ControlFlow.*Python values")
def test_every_net_of_the_zoo_as_a_file(name, engine, tmp_path) -> None:
    """Within three quantization steps of the output."""
    torch.manual_seed(0)
    net = ZOO[name]().eval()
    args, kwargs = net.example
    quantizer = calibrated(net, ExampleInput(args, kwargs), Int8(engine=engine))
    before = torch.backends.quantized.engine
    example = ExampleInput(args, kwargs)
    report = export_model(net, example, tmp_path / "net.ptl", parity=Tolerance(quant_steps=3), latency_runs=1)
    assert torch.backends.quantized.engine == before
    assert quantizer.enabled
    details = report.details
    assert details["engine"] == engine
    lines = {line.partition(":")[0] for line in details["built_in_values"]}
    assert lines == ({zoo.__file__} if name == "control_flow" else set())
    left = ["up"] if engine == "x86" and name in TRANSPOSED else []
    assert list(details["left_float"]) == left
    assert details["int8_layers"] == len(quantizer.plan.layers) - len(left)
    heavy = sum(count for kind, count in details["int8_operations"].items() if "conv" in kind or "linear" in kind)
    assert heavy >= details["int8_layers"]


@pytest.mark.skipif("x86" not in ENGINES, reason="this torch has no x86 kernels")
def test_the_defect_of_transposed_convolutions_on_x86_is_there_and_is_avoided(tmp_path) -> None:
    """If a release of torch has mended the kernel, this fails: then it need no longer stay float."""
    torch.manual_seed(0)
    net = ZOO["transposed"]().eval()
    args, kwargs = net.example
    quantizer = calibrated(net, ExampleInput(args, kwargs), Int8(engine="x86"))
    with pytest.warns(UserWarning, match="stay float: {'up': 'the x86 kernel of transposed"):
        report = exported(net, tmp_path, *args)
    assert report.parity.max_absolute == 0.0
    with torch.no_grad():
        right = net(*args)
        lowering = QuantizedOpsLowering(quantizer, "qnnpack")  # which does not refuse it
        try:
            with kernels_of("x86"):
                quantizer.lowering = lowering
                net(*args)
                lowering.build()
                off = float((net(*args) - right).abs().max())
        finally:
            quantizer.lowering = None
    assert off > 10 * report.details["output_scales"][0]


@pytest.mark.parametrize("engine", ENGINES)
def test_relu6_does_not_meet_the_clamp_of_qnnpack(engine, tmp_path) -> None:
    """On channels-last tensors, as its convolutions make them, that kernel clamps every number away."""

    class Six(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu6(3 * self.first(x))  # not absorbed
            return F.relu6(self.second(x)).clamp(0.1, 0.5)

    torch.manual_seed(0)
    net = Six().eval()
    images = 3 * noise(2, 3, 8, 8)
    calibrated(net, ExampleInput((images,)), Int8(engine=engine))
    report = exported(net, tmp_path, images)
    assert report.details["int8_layers"] == 2
    assert report.parity.max_absolute < 0.05


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "pool",
    [
        lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        lambda: nn.AvgPool2d(3, divisor_override=5),
        lambda: nn.MaxPool2d(3, 2, 1, dilation=2),
        lambda: nn.Sequential(nn.Flatten(2), nn.MaxPool1d(3, 2, 1, dilation=(2,))),
    ],
    ids=["border", "divisor", "dilation", "one sample in one dimension"],
)
def test_pools_with_options_that_kernels_ignore(pool, engine, tmp_path) -> None:
    """Those of QNNPACK would be dozens of steps off, and one of x86 that gets one sample."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), pool()).eval()
    images = noise(2, 3, 12, 12)
    calibrated(net, ExampleInput((images,)), Int8(engine=engine))
    assert max(exported(net, tmp_path, images, parity=Tolerance(quant_steps=1.01)).parity.quant_steps.values()) <= 1.01


@pytest.mark.parametrize("engine", ENGINES)
def test_sums_of_scales_far_apart_stay_float(engine, tmp_path) -> None:
    """QNNPACK stops the process where an operand's scale is 2**8 times the sum's."""

    class Far(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.third(y + self.second(x))

    torch.manual_seed(0)
    net = Far().eval()
    with torch.no_grad():
        net.second.weight.copy_(-net.first.weight * (1 - 1e-4))
        net.second.bias.copy_(-net.first.bias * (1 - 1e-4))  # type: ignore[operator, union-attr]
    calibrated(net, ExampleInput((noise(2, 3, 8, 8),)), Int8(engine=engine))
    report = exported(net, tmp_path, noise(2, 3, 8, 8))
    assert "quantized::add" not in report.details["int8_operations"]
    assert report.details["int8_layers"] == 3


@pytest.mark.parametrize("engine", ENGINES)
def test_hardswish_is_int8(engine, tmp_path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Hardswish(), nn.Conv2d(8, 4, 3)).eval()
    images = 3 * noise(2, 3, 8, 8)
    calibrated(net, ExampleInput((images,)), Int8(engine=engine))
    report = exported(net, tmp_path, images, parity=Tolerance(quant_steps=1.01))
    assert report.details["int8_operations"]["quantized::hardswish"] == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_is_a_quarter_and_takes_any_batch(engine, tmp_path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 256, 3), nn.ReLU(), nn.Conv2d(256, 64, 3)).eval()
    images = noise(2, 3, 8, 8)
    plain = export_model(net, (images,), tmp_path / "float.ptl", latency_runs=1)
    calibrated(net, ExampleInput((images,)), Int8(engine=engine))
    small = exported(net, tmp_path, images)
    assert small.bytes < 0.27 * plain.bytes
    run = TorchScriptLite().load(tmp_path / "net.ptl")
    assert torch.equal(torch.cat([run(images[:1]), run(images[1:])]), run(images))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_holds_each_weight_once_and_scales_and_biases_together(engine, tmp_path) -> None:
    """A record costs about two hundred bytes; and full torch computes the same as the lite interpreter."""
    layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Conv2d(12, 20, 1), nn.Conv2d(20, 16, 1)]
    net = nn.Sequential(*layers).eval()
    calibrated(net, ExampleInput((noise(2, 3, 8, 8),)), Int8(engine=engine))
    exported(net, tmp_path, noise(2, 3, 8, 8))
    with zipfile.ZipFile(tmp_path / "net.ptl") as archive:
        records = archive.infolist()
    tensors = Counter(record.file_size for record in records if "/data/" in record.filename)
    channels = 8 + 12 + 20 + 16
    once = [layer.weight.numel() for layer in layers] + [8 * channels, 8 * 20, 4 * channels]  # scales, zeros, biases
    assert all(tensors.pop(size) == 1 for size in once)
    assert sum(tensors.values()) == len(layers)  # strides and the like, which torch writes for each layer
    with quiet_deprecations(), kernels_of(engine):
        right = TorchScriptLite().load(tmp_path / "net.ptl")(noise(2, 3, 8, 8))
        assert torch.equal(torch.jit.load(tmp_path / "net.ptl")(noise(2, 3, 8, 8)), right)


def test_scales_of_channels_share_a_storage_and_what_there_is_of_biases() -> None:
    weights = {
        "bare": QuantizedWeight(torch.ones(2, 3), torch.tensor([1.0, 2.0]).double(), None),
        "one scale": QuantizedWeight(torch.ones(3, 3), torch.tensor(3.0).double(), torch.tensor([7.0, 8.0, 9.0])),
        "both": QuantizedWeight(torch.ones(2, 3), torch.tensor([4.0, 5.0]).double(), torch.tensor([1.0, 2.0])),
    }
    placed = share_storage(weights)
    assert list(placed) == list(weights)
    for name, weight in weights.items():
        assert placed[name].integers is weight.integers
        assert torch.equal(placed[name].scale, weight.scale)
    assert placed["bare"].bias is None
    assert placed["bare"].scale.untyped_storage().data_ptr() == placed["both"].scale.untyped_storage().data_ptr()
    assert placed["one scale"].bias.tolist() == [7.0, 8.0, 9.0]  # type: ignore[union-attr]
    assert placed["both"].bias.tolist() == [1.0, 2.0]  # type: ignore[union-attr]
    assert share_storage({}) == {}


def test_a_trained_network_is_exported_when_the_fit_ends(tmp_path) -> None:
    stages: dict[str, Any] = {"start": 0.25, "calibration_batches": 2, "freeze_observers": 0.75}
    module: Any = module_class(Body, DEFAULT_HOST)()
    export = MobileExport(tmp_path / "net.ptl", latency_runs=1)
    trainer(QuantizationAwareTraining(Int8(observer=MovingAverage(0.5)), **stages), export).fit(module)
    assert export.report is not None
    assert export.report.details["int8_layers"] == 5
    assert not export.report.details["left_float"]
    evaluation = export.report.evaluation
    assert evaluation is not None
    assert evaluation.batches == 1  # the Trainer's limit
    assert evaluation.top1_agreement is not None
    assert 0.9 <= evaluation.top1_agreement <= 1.0
    assert evaluation.summary() in export.report.summary()
    assert type(export.report).read(f"{export.path}.json") == export.report
    images = module.val_dataloader().batches[0][0]
    with fake_quantized(module.eval()):
        torch.testing.assert_close(
            TorchScriptLite().load(tmp_path / "net.ptl")(images), module(images), rtol=0.0, atol=0.1
        )


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_classes_are_compared_in_the_precision_of_the_trainer(precision, tmp_path) -> None:
    module: Any = module_class(Body, DEFAULT_HOST)()
    module.example_input_array = noise(2, 3, 8, 8)
    export = MobileExport(tmp_path / "net.ptl", latency_runs=1)
    qat = QuantizationAwareTraining(Int8(), start=0.0, calibration_batches=2)
    trainer(qat, export, precision=precision).fit(module)
    assert export.report is not None
    assert export.report.inputs[0]["dtype"] == {"64-true": "float64", "bf16-true": "bfloat16"}[precision]
    assert export.report.evaluation is not None
    assert export.report.evaluation.batches > 0


def test_a_float_network_makes_a_float_file_and_fits_no_engine(tmp_path) -> None:
    net, images = ZOO["plain"]().eval(), noise(2, 3, 8, 8)
    quantizer = calibrated(net, ExampleInput((images,)))
    quantizer.enabled = False
    report = exported(net, tmp_path, images)
    assert "int8_layers" not in report.details
    assert not report.parity.quant_steps
    with pytest.raises(UnsupportedError, match=r"found a float one.*for a float file write `TorchScriptLite\(\)`"):
        exported(net, tmp_path, images, exporter=TorchScriptLite("qnnpack"))
    with pytest.raises(ValueError, match=r"expected one of .*or None"):
        TorchScriptLite("arm")  # type: ignore[arg-type]


@pytest.mark.skipif(len(ENGINES) < 2, reason="this torch has the kernels of one engine")
def test_an_engine_with_a_smaller_range_than_the_recipe_is_refused(tmp_path) -> None:
    net, images = ZOO["plain"]().eval(), noise(2, 3, 8, 8)
    quantizer = calibrated(net, ExampleInput((images,)))
    with pytest.raises(UnsupportedError, match=r"found \[-127, 127\], for 'qnnpack'.*Int8\(engine='x86'\)"):
        exported(net, tmp_path, images, exporter=TorchScriptLite("x86"))
    quantizer.remove()
    calibrated(net, ExampleInput((images,)), Int8(engine="x86"))
    assert exported(net, tmp_path, images, exporter=TorchScriptLite("qnnpack")).details["engine"] == "qnnpack"


class Saturating(nn.Module):
    """Two products of eight bits per pair of inputs, each at the largest value."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.depthwise = nn.Conv2d(64, 128, 3, padding=1), nn.Conv2d(128, 128, 3, padding=1, groups=128)
        self.head = nn.Linear(128, 5)
        for layer in (self.dense, self.depthwise):
            nn.init.constant_(layer.weight, 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.depthwise(self.dense(x)).amax((2, 3)))


@pytest.mark.skipif("x86" not in ENGINES, reason="this torch has no x86 kernels")
@pytest.mark.parametrize("reduce_range", [None, False])
def test_the_largest_products_do_not_overflow_on_x86(reduce_range, tmp_path) -> None:
    if reduce_range is False and not torch.cpu._is_vnni_supported():
        pytest.skip("this processor has no VNNI")
    torch.manual_seed(0)
    net, images = Saturating().eval(), torch.ones(2, 64, 6, 6) * torch.tensor([0.5, 1.0])[:, None, None, None]
    calibrated(net, ExampleInput((images,)), Int8(engine="x86", reduce_range=reduce_range, observer=MinMax()))
    report = exported(net, tmp_path, images, parity=Tolerance(quant_steps=1))
    assert report.details["int8_layers"] == 3
    assert report.details["engine"] == "x86"


def test_fake_quantizing_twice_is_refused(tmp_path) -> None:
    net, images = ZOO["plain"]().eval(), noise(2, 3, 8, 8)
    calibrated(net, ExampleInput((images,)))
    calibrated(net, ExampleInput((images,)))
    with pytest.raises(UnsupportedError, match="found 2 callbacks or contexts"):
        exported(net, tmp_path, images)


def test_channels_of_zeros_do_not_let_their_bias_overflow(tmp_path) -> None:
    """A bias counted in units of a scale of nothing is no 32-bit number."""
    net, images = ZOO["plain"]().eval(), noise(2, 3, 8, 8)
    with torch.no_grad():
        net.conv1.weight[1] = 0.0  # type: ignore[union-attr, index, operator]
        net.bn1.weight[2] = 0.0  # type: ignore[union-attr, index, operator]
        net.bn1.bias.fill_(1.0)  # type: ignore[union-attr, operator]
    calibrated(net, ExampleInput((images,)))
    assert exported(net, tmp_path, images, parity=Tolerance(quant_steps=2)).parity.quant_steps["output"] <= 1.0


def test_an_output_without_a_grid_is_compared_in_steps_of_its_range(tmp_path) -> None:
    net, images = ZOO["plain"]().eval(), noise(2, 3, 8, 8)
    calibrated(net, ExampleInput((images,)), Int8(exclude=["fc"]))
    with pytest.warns(UserWarning, match="stay float: {'fc'"):
        report = exported(net, tmp_path, images)
    assert report.details["output_scales"] == [0.0]
    assert 0.0 <= report.parity.quant_steps["output"] <= 8.0


class TestQuantize:
    """Ranges from a few batches, without training."""

    def test_ranges_hold_all_that_was_seen_and_the_module_is_as_before(self) -> None:
        net = ZOO["plain"]().train()
        before = {name: value.clone() for name, value in net.state_dict().items()}
        batches = [noise(2, 3, 8, 8), 2 * noise(2, 3, 8, 8)]
        assert quantize(net, None, Int8(), data=batches) is net
        assert net.training
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
        net.eval()
        with torch.no_grad(), fake_quantized(net):
            quantized = net(batches[0])
        assert not torch.equal(quantized, net(batches[0]))
        torch.testing.assert_close(quantized, net(batches[0]), atol=0.05, rtol=0.05)

    def test_what_gives_no_range_is_refused(self) -> None:
        net = ZOO["plain"]()
        with pytest.raises(ValueError, match="found no batch"):
            quantize(net, None, Int8(), data=[])
        with pytest.raises(ValueError, match="no convolution or linear layer"):
            quantize(nn.Sequential(nn.ReLU()), noise(2, 3), Int8())

    def test_inputs_by_name(self) -> None:
        class Named(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(6, 4)

            def forward(self, *, x: Tensor) -> Tensor:
                return self.layer(x)

        net = Named()
        quantize(net, {"x": noise(2, 6)}, Int8())
        with fake_quantized(net), torch.no_grad():
            assert (net(x=noise(2, 6)) - net.layer(noise(2, 6))).abs().max() < 0.1
