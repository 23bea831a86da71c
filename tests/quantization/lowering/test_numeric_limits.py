"""Values that overflow the accumulator of an int8 kernel, and operators that only look like views."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_light.export import ONNX, ExecuTorch, Exporter, Tolerance, TorchScriptLite, export_model
from lightning_light.quantization import Int8, fake_quantized, quantize
from lightning_light.quantization.lowering.base import fold
from lightning_light.quantization.specs import WeightSpec
from tests.quantization.helpers import Beside
from tests.zoo import noise

EXPORTERS = [TorchScriptLite(), ExecuTorch(), ONNX()]
IMAGES = noise(2, 3, 8, 8)

every_runtime = pytest.mark.parametrize("exporter", EXPORTERS, ids=["lite", "executorch", "onnx"])


def exported(net: nn.Module, exporter: Exporter, folder: Path, *inputs: Tensor, **options: Any) -> Any:
    quantize(net.eval(), inputs or (IMAGES,), Int8())
    with fake_quantized(net):
        return export_model(
            net,
            inputs or (IMAGES,),
            folder / f"net{exporter.suffix}",
            exporter=exporter,
            latency_runs=1,
            **{"parity": Tolerance(quant_steps=1.1), **options},
        )


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))


def with_a_channel_that_is_all_but_dead() -> nn.Module:
    """Its bias, counted in steps of its weight times those of its input, is beyond 2**31."""
    net = two_layers()
    with torch.no_grad():
        net[0].weight[1] *= 1e-6
        net[0].bias[1] = 1.0
    return net


def with_a_layer_that_is_dead() -> nn.Module:
    """What it writes is zero alone, and so is every step that the next bias would be counted in."""
    net = two_layers()
    with torch.no_grad():
        net[0].bias -= 100.0
    return net


def for_inputs_that_are_all_but_zero() -> nn.Module:
    net = two_layers()
    with torch.no_grad():
        net[0].bias += 1.0
    return net


def with_sums_that_are_coarser_than_their_grid() -> nn.Module:
    """All but the last thousandth of a step is cut off: XNNPACK does not load such a layer, which stays float."""
    net = two_layers()
    with torch.no_grad():
        net[0].bias.fill_(0.0)
        top = net[0](IMAGES).amax((0, 2, 3))
        net[0].bias.copy_(-top + 1e-5)
    return net


@every_runtime
def test_values_that_int8_kernels_do_not_hold(exporter, tmp_path) -> None:
    net = Beside(
        channel=with_a_channel_that_is_all_but_dead(),
        layer=with_a_layer_that_is_dead(),
        inputs=for_inputs_that_are_all_but_zero(),
        sums=with_sums_that_are_coarser_than_their_grid(),
    )
    with pytest.warns(UserWarning, match=r"stay float: {'sums\.0': 'one step of its sums is more than the whole range"):
        report = exported(net, exporter, tmp_path, IMAGES, IMAGES, IMAGES * 1e-6, IMAGES)
    assert report.details["int8_layers"] == 7
    assert len(report.parity.quant_steps) == 4


def test_a_weight_on_a_wider_grid_is_the_same_weight() -> None:
    """``|q s - q' s'| <= s' / 2``, where ``s'`` is just wide enough for ``bias / (reads * s')`` to fit in 30 bits."""
    w, bias = noise(5, 7).double(), noise(5).double() * 1e5
    w[2] *= 1e-7
    reads, writes = 0.02, 0.1
    weight = fold({"weight": w, "bias": bias}, None, WeightSpec(), None, reads, writes)
    plain = w.abs().amax(1) / 127
    least = torch.maximum(bias.abs(), torch.tensor(writes)) / (reads * 2**30)
    torch.testing.assert_close(weight.scale, torch.maximum(plain, least), rtol=1e-6, atol=0.0)
    assert (weight.scale > plain * 1.01).tolist() == (least > plain * 1.01).tolist()
    assert weight.scale[2] > 100 * plain[2]
    found = weight.integers.double() * weight.scale[:, None]
    assert ((found - w).abs() <= 0.5001 * (weight.scale + plain)[:, None]).all()
    assert ((bias.abs() / (reads * weight.scale)) <= 2**30 * 1.0001).all()


class Between(nn.Module):
    """An operator on the activations between two layers."""

    def __init__(self, operation: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.operation = operation
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.operation(self.first(x).relu()))


OPERATIONS = {
    "mean over channels": lambda x: x * 1.0 - x.mean(1, keepdim=True),
    "padding with a number": lambda x: F.pad(x, (1, 1, 1, 1), value=-3.0),
    "reflection": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "mean over space": lambda x: x + x.mean((2, 3), keepdim=True),
}


@every_runtime
def test_only_views_keep_quantization_parameters(exporter, tmp_path) -> None:
    """Nothing is quantized in the file that is not quantized in the module."""
    net = Beside(**{name: Between(operation) for name, operation in OPERATIONS.items()})
    report = exported(net, exporter, tmp_path, *[IMAGES] * len(OPERATIONS), batch="one")
    assert len(report.parity.quant_steps) == len(OPERATIONS)
    assert max(report.parity.quant_steps.values()) <= 1.01
    assert report.details["int8_layers"] == 2 * len(OPERATIONS)


class Attended(nn.Module):
    """The fused attention gives a tuple."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        attended, _ = self.attention(x, x, x, need_weights=False)
        return self.head(attended)


@every_runtime
def test_what_comes_in_a_tuple_is_rounded_where_it_is_read(exporter, tmp_path) -> None:
    report = exported(Attended(), exporter, tmp_path, noise(2, 5, 8))
    assert report.details["int8_layers"] == 1
    assert report.details["left_float"] == {}
    found = {"attention": "MultiheadAttention", "attention.out_proj": "NonDynamicallyQuantizableLinear"}
    assert report.details["never_int8"] == found
    assert "; never int8: attention, attention.out_proj" in report.summary()


@pytest.mark.parametrize("exporter", EXPORTERS[1:], ids=["executorch", "onnx"])
def test_half_precision_stays_as_it_is_and_is_listed(exporter, tmp_path) -> None:
    net = two_layers().half()
    with pytest.warns(UserWarning, match=r"'0': 'its weight is torch.float16, .* compute in torch.float32"):
        report = exported(net, exporter, tmp_path, IMAGES.half(), parity=Tolerance(absolute=0.01))
    assert report.details["int8_layers"] == 0


def test_an_output_of_one_number_has_no_steps(tmp_path) -> None:
    class Both(Between):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(x), self.first(x).mean()

    report = exported(Both(lambda x: x), TorchScriptLite(), tmp_path, batch="as_given")
    assert list(report.parity.quant_steps) == ["output[0]"]


def test_a_weight_that_is_computed_belongs_to_its_layer(tmp_path) -> None:
    net = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.Flatten(), nn.Linear(144, 3))
    assert exported(net, TorchScriptLite(), tmp_path).details["never_int8"] == {}


@given(seed=st.integers(0, 50))
@settings(deadline=None)
def test_a_folded_batch_norm_is_equation_14_of_jacob(seed) -> None:
    """``w g`` and ``beta + (b - mean) g`` with ``g = gamma / sqrt(var + eps)``; quantized by one scale per channel."""
    generator = torch.Generator().manual_seed(seed)
    w, (bias, gamma, beta, mean) = torch.randn(6, 3, 3, 3, generator=generator), torch.randn(4, 6, generator=generator)
    var = torch.rand(6, generator=generator) + 0.01
    norm = {"running_mean": mean, "running_var": var, "weight": gamma, "bias": beta, "eps": 1e-3}
    found = fold({"weight": w, "bias": bias}, norm, WeightSpec(), None, reads=0.02, writes=0.1)
    g = gamma.double() / torch.sqrt(var.double() + 1e-3)
    right = w.double() * g[:, None, None, None]
    s = right.abs().flatten(1).amax(1) / 127
    torch.testing.assert_close(found.scale, s, rtol=1e-6, atol=0.0)
    off = (found.integers.double() * s[:, None, None, None] - right).abs().flatten(1).amax(1)
    assert (off <= 0.5001 * s).all()
    assert found.bias is not None
    torch.testing.assert_close(
        found.bias.double(), beta.double() + (bias.double() - mean.double()) * g, rtol=1e-6, atol=1e-6
    )
