"""Against the formulas of Jacob et al. (2018), restated here in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval
from torch.overrides import TorchFunctionMode

from lightning_light.example_input import ExampleInput
from lightning_light.quantization.fake_quantize import (
    fake_quantize,
    fake_quantize_bias,
    fake_quantize_weight,
    merge_ranges,
    qparams_of,
    quantize_weight,
)
from lightning_light.quantization.lowering.qdq import register_operations
from lightning_light.quantization.specs import ActivationSpec, QParams, WeightSpec
from tests.quantization.helpers import calibrated
from tests.zoo import noise

INT8 = WeightSpec(8, -127, 127)


def jacob(r: Tensor, scale: float, zero: int, low: int, high: int) -> Tensor:
    """``r = S (q - Z)``, ``q = clamp(round(r / S) + Z)``: their equations 1 and 12, ties to even as in torch."""
    q = torch.clamp(torch.round(r.double() / scale) + zero, low, high)
    return scale * (q - zero)


@given(low=st.floats(-50, 0), high=st.floats(0.01, 50))
def test_activations(low, high) -> None:
    (qparams,) = qparams_of([ActivationSpec()], torch.tensor([[low, high]]))
    assert qparams is not None
    scale, zero, _ = qparams
    x = torch.linspace(low - 1, high + 1, 1001)
    x = x[((x.double() / scale) % 1 - 0.5).abs() > 1e-3]  # a tie in float64 need not be one in float32
    found = fake_quantize(x, qparams)
    torch.testing.assert_close(found.double(), jacob(x, scale, zero, 0, 255), atol=1e-5, rtol=1e-5)
    assert fake_quantize(torch.zeros(1), qparams).item() == 0.0
    inside = x[(x >= low) & (x <= high)]
    assert (fake_quantize(inside, qparams) - inside).abs().max() <= scale * 1.001


def test_ties_are_rounded_as_by_the_operations_of_torch() -> None:
    """The operations of a graph take 1 / s in float64, torch's own in float32."""
    register_operations()
    ops = torch.ops.quantized_decomposed
    tops = torch.rand(500, generator=torch.Generator().manual_seed(0)) + 0.5
    for qparams in qparams_of([ActivationSpec()] * len(tops), torch.stack([-0.3 * tops, tops], 1)):
        assert qparams is not None
        scale, zero, _ = qparams
        ties = (torch.arange(-zero, 255 - zero) + 0.5) * scale
        x = torch.cat([ties, ties.nextafter(torch.ones(())), ties.nextafter(-torch.ones(()))])
        q = ops.quantize_per_tensor.default(x, scale, zero, 0, 255, torch.uint8)
        quantized = fake_quantize(x, qparams)
        assert torch.equal(quantized, ops.dequantize_per_tensor.default(q, scale, zero, 0, 255, torch.uint8))
        assert torch.equal(quantized, torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255))


def test_gradients_pass_straight_through_within_the_range() -> None:
    x = torch.tensor([-3.0, -0.4, 0.3, 9.0], requires_grad=True)
    fake_quantize(x, QParams(0.01, 100)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]
    w = noise(4, 3).requires_grad_()
    (fake_quantize_weight(w, INT8)[0] * noise(4, 3)).sum().backward()
    assert torch.equal(w.grad, noise(4, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [127, 63])
@pytest.mark.parametrize("per_channel", [True, False])
def test_weights(per_channel, limit) -> None:
    w = noise(6, 4, 3, 3)
    largest = w.double().abs().flatten(1).amax(1) if per_channel else w.double().abs().amax().expand(6)
    scale = (largest / limit)[:, None, None, None]
    torch.testing.assert_close(
        fake_quantize_weight(w, WeightSpec(8, -limit, limit, per_channel=per_channel))[0].double(),
        scale * torch.round(w.double() / scale),
        atol=1e-6,
        rtol=1e-6,
    )


def test_zeros_stay_zero_and_a_dead_channel_has_a_scale() -> None:
    w = noise(6, 8)
    w[:, ::2] = 0.0
    w[3] = 0.0
    quantized = fake_quantize_weight(w, INT8)[0]
    assert torch.equal(quantized == 0, (quantized == 0) | (w == 0))
    assert (quantized[w == 0] == 0).all()
    assert (quantize_weight(w, INT8)[1] > 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_types_are_kept(dtype) -> None:
    assert fake_quantize_weight(noise(3, 4).to(dtype), INT8)[0].dtype == dtype
    assert fake_quantize(noise(3, 4).to(dtype), QParams(0.02, 128)).dtype == dtype


def test_quantizing_before_the_fold_is_quantizing_after_it() -> None:
    """Fold, then quantize, as in a file; and quantize, then normalize, as in training: the same function."""
    conv, bn = nn.Conv2d(3, 8, 3, bias=False).eval(), nn.BatchNorm2d(8).eval()
    with torch.no_grad():
        bn.weight.copy_(noise(8))  # of both signs
        bn.running_var.copy_(noise(8).abs() + 0.1)
        bn.running_mean.copy_(noise(8))
        images = noise(2, 3, 8, 8)
        folded = fuse_conv_bn_eval(conv, bn)
        engine = torch.conv2d(images, fake_quantize_weight(folded.weight, INT8)[0], folded.bias)
        training = bn(torch.conv2d(images, fake_quantize_weight(conv.weight, INT8)[0]))
    torch.testing.assert_close(engine, training, atol=1e-5, rtol=1e-5)


def test_quantization_parameters_of_ranges() -> None:
    ranges = torch.tensor([[-1.0, 9.0], [-1.0, 9.0], [torch.inf, -torch.inf], [0.0, 0.0]])
    specs = [
        ActivationSpec(non_negative=True),
        ActivationSpec(non_negative=True, upper_bound=6.0),
        ActivationSpec(),
        ActivationSpec(),
    ]
    plain, capped, unseen, zeros = qparams_of(specs, ranges)
    assert plain == (pytest.approx(9 / 255), 0, 255)
    assert capped == (pytest.approx(6 / 255), 0, 255)
    assert unseen is None
    assert zeros is not None
    assert zeros.scale > 0


def test_moving_average() -> None:
    infinite, momentum = torch.tensor([[torch.inf, -torch.inf]]), torch.tensor([0.25])
    first = merge_ranges(infinite, torch.tensor([[-1.0, 2.0]]), momentum)
    assert first.tolist() == [[-1.0, 2.0]]
    assert merge_ranges(first, torch.tensor([[-2.0, 6.0]]), momentum).tolist() == [[-1.25, 3.0]]
    assert merge_ranges(first, infinite, momentum).tolist() == first.tolist()
    assert merge_ranges(first, torch.tensor([[torch.nan, torch.inf]]), momentum).tolist() == first.tolist()


def test_biases_are_int32_in_units_of_input_times_weight() -> None:
    bias, unit = noise(6).requires_grad_(), torch.full((6,), 0.003).double()
    found = fake_quantize_bias(bias, unit)
    steps = found.detach().double() / unit
    torch.testing.assert_close(steps, steps.round(), rtol=0.0, atol=1e-3)
    assert float((found - bias).detach().abs().max()) <= 0.00151
    found.sum().backward()
    assert bias.grad is not None
    assert bias.grad.tolist() == [1.0] * 6


@pytest.mark.parametrize("bias", [True, False])
def test_the_bias_of_a_folded_batch_norm_is_quantized_where_the_batch_norm_adds_it(bias) -> None:
    """``beta + (b - mean) g`` is a multiple of ``s_x s_w |g|``, ``g = gamma / sqrt(var + eps)``."""
    conv, bn = nn.Conv2d(3, 8, 3, bias=bias), nn.BatchNorm2d(8)
    with torch.no_grad():
        for tensor in (bn.weight, bn.bias, bn.running_mean):
            tensor.copy_(noise(8))  # type: ignore[union-attr]
    net, images = nn.Sequential(conv, bn).eval(), noise(2, 3, 8, 8)
    quantizer = calibrated(net, ExampleInput((images,)))
    (site,) = quantizer.plan.layers.values()
    reads = quantizer.qparams[site.input or 0]
    assert reads is not None
    seen: list[Tensor] = []

    class Spy(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__name__", "") == "batch_norm":
                seen.append(kwargs["bias"].detach().double())
            return func(*args, **(kwargs or {}))

    with Spy(), torch.no_grad():
        net(images)
        gain = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()  # type: ignore[union-attr]
        own = torch.zeros(8) if conv.bias is None else conv.bias
        shift = seen[-1] + (own.double() - bn.running_mean.double()) * gain  # type: ignore[union-attr]
        steps = shift / (reads.scale * quantize_weight(conv.weight, INT8)[1].double() * gain.abs())
    torch.testing.assert_close(steps, steps.round(), rtol=0.0, atol=0.02)
    assert float((seen[-1] - bn.bias.detach()).abs().max()) > 0.0
