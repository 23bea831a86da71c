"""LSQ, LSQ+, PACT and straight-through gradients against their papers' formulas, restated here in float64."""

import pytest
import torch
from torch import Tensor

from lightning_light.quantization import LSQ, PACT
from lightning_light.quantization.fake_quantize import (
    dampening_gradient,
    fake_quantize,
    fake_quantize_learned,
    fake_quantize_weight,
    initial_scale,
    qparams_of,
)
from lightning_light.quantization.learned_qparams import (
    initial_values,
    learned_qparams_of,
    names_of,
)
from lightning_light.quantization.observers import LSQObserver
from lightning_light.quantization.specs import ActivationSpec, QParams, WeightSpec
from tests.zoo import noise


def other(*shape: int) -> Tensor:
    """Values that are independent of `noise`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def away_from_ties(x: Tensor, scale: float) -> Tensor:
    """A tie in float64 need not be one in float32."""
    return x[((x.double() / scale) % 1 - 0.5).abs() > 1e-3]


def esser(v: Tensor, s: float, low: int, high: int, weights: Tensor) -> tuple[Tensor, Tensor, float]:
    """Equations 1 to 3 and section 2.2: the quantized values, the gradients to them and to ``s``."""
    v = v.double()
    bar = torch.round(torch.clamp(v / s, low, high))
    inside = (v / s > low) & (v / s < high)
    of_s = torch.where(inside, -v / s + torch.round(v / s), bar)
    return bar * s, weights * inside, float((weights * of_s).sum())


@pytest.mark.parametrize(("low", "high"), [(-8, 7), (-128, 127), (-2, 1)])
def test_lsq_of_a_weight(low, high) -> None:
    step = 0.07
    w = away_from_ties(noise(4000) * 0.6, step)
    w = w.requires_grad_()
    s = torch.tensor(step, requires_grad=True)
    upstream = other(len(w))
    quantized = fake_quantize_weight(w, WeightSpec(0, low, high, per_channel=False, learned=True), s)[0]
    (quantized * upstream).sum().backward()
    right, of_w, of_s = esser(w.detach(), step, low, high, upstream.double())
    assert w.grad is not None
    assert s.grad is not None
    torch.testing.assert_close(quantized.double(), right, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(w.grad.double(), of_w)
    assert float(s.grad) == pytest.approx(of_s / (len(w) * high) ** 0.5, rel=1e-4)


def test_every_channel_has_its_own_step_and_gradient() -> None:
    w, rule = noise(4, 3, 3, 3).requires_grad_(), WeightSpec(4, -8, 7, learned=True)
    steps = torch.tensor([0.05, 0.1, 0.2, 0.4], requires_grad=True)
    (fake_quantize_weight(w, rule, steps)[0] * other(4, 3, 3, 3)).sum().backward()
    for channel in range(4):
        one = steps.detach()[channel].clone().requires_grad_()
        alone = fake_quantize_weight(w.detach()[channel], WeightSpec(4, -8, 7, per_channel=False, learned=True), one)[0]
        (alone * other(4, 3, 3, 3)[channel]).sum().backward()
        torch.testing.assert_close(steps.grad[channel], one.grad)  # type: ignore[index]


@pytest.mark.parametrize("positive", [True, False])
def test_lsq_of_numbers_counts_those_of_one_sample(positive) -> None:
    spec = ActivationSpec(non_negative=positive, bits=4, learned="scale")
    low, high = (0, 15) if positive else (-8, 7)
    x = noise(2, 3, 8, 8).abs() if positive else noise(2, 3, 8, 8)
    s = torch.tensor(0.09, requires_grad=True)
    fake_quantize_learned(x, spec, s).sum().backward()
    _, _, of_s = esser(x, 0.09, low, high, torch.ones(x.shape).double())
    assert float(s.grad) == pytest.approx(of_s / (3 * 8 * 8 * high) ** 0.5, rel=1e-3)  # type: ignore[arg-type]


def test_dampening() -> None:
    """Equation 7 of Nagel et al., with autograd: ``|w_hat - clip(w, s n, s p)|^2``, with ``w_hat`` as a constant."""
    spec = WeightSpec(3, -4, 3, learned=True, dampening=0.5)
    w, s = noise(4, 3, 3, 3).requires_grad_(), torch.tensor([0.05, 0.1, 0.2, 0.4]).requires_grad_()
    step = s.detach()[:, None, None, None]
    quantized = (w.detach() / step).round().clamp(-4, 3) * step
    (0.5 * ((quantized - w.clamp(-4 * step, 3 * step)) ** 2).sum()).backward()
    torch.testing.assert_close(dampening_gradient(w, spec, s), w.grad)
    assert s.grad is None
    assert 0 < int((w.grad == 0).sum()) < w.numel()  # type: ignore[union-attr]  # outside of the range


def test_lsq_plus() -> None:
    """Equations 3 to 5 of Bhalgat et al., with an exact zero: ``x_hat = round(clamp((x - b) / s)) s + b``."""
    step, zero, high = 0.1, 4, 15
    beta = -step * zero
    x = away_from_ties(noise(4000), step).requires_grad_()
    s, b = torch.tensor(step, requires_grad=True), torch.tensor(beta, requires_grad=True)
    upstream = other(len(x)).double()
    quantized = fake_quantize_learned(x, ActivationSpec(bits=4, learned="scale and offset"), s, b)
    (quantized.double() * upstream).sum().backward()
    v = (x.detach().double() - beta) / step
    right = torch.round(v).clamp(0, high) * step + beta
    inside = (v > 0) & (v < high)
    of_s = torch.where(inside, torch.round(v) - v, torch.where(v > 0, float(high), 0.0))
    factor = (1 * high) ** -0.5  # a sample has one value here
    torch.testing.assert_close(quantized.detach().double(), right, atol=1e-5, rtol=1e-5)
    assert s.grad is not None
    assert b.grad is not None
    assert float(s.grad) == pytest.approx(float((upstream * of_s).sum()) * factor, rel=1e-4)
    assert float(b.grad) == pytest.approx(float((upstream * ~inside).sum()) * factor, rel=1e-4)


def test_pact() -> None:
    """Equations 1 to 3 of Choi et al."""
    alpha, k = 0.9, 4
    x = away_from_ties(noise(4000), alpha / 15).requires_grad_()
    a = torch.tensor(alpha, requires_grad=True)
    upstream = other(len(x))
    quantized = fake_quantize_learned(x, ActivationSpec(non_negative=True, bits=k, learned="clip"), a)
    (quantized * upstream).sum().backward()
    y = 0.5 * (x.detach().double().abs() - (x.detach().double() - alpha).abs() + alpha)
    right = torch.round(y * (2**k - 1) / alpha) * alpha / (2**k - 1)
    torch.testing.assert_close(quantized.detach().double(), right, atol=1e-5, rtol=1e-5)
    assert float(a.grad) == pytest.approx(float(upstream[x >= alpha].sum()), rel=1e-4)  # type: ignore[arg-type]
    assert torch.equal(x.grad != 0, (x > 0) & (x < alpha))  # type: ignore[operator]


def first_scale(w: Tensor, per_channel: bool) -> Tensor:
    return initial_scale(w, WeightSpec(4, -8, 7, per_channel=per_channel))


def test_first_scales() -> None:
    """``2 <|v|> / sqrt(high)``: section 2.1 of Esser et al."""
    w = noise(4, 9)
    torch.testing.assert_close(first_scale(w, True).double(), 2 * w.double().abs().mean(1) / 7**0.5)
    torch.testing.assert_close(first_scale(w, False).double(), 2 * w.double().abs().mean() / 7**0.5)
    masked = w.clone()
    masked[:, :3] = 0.0
    torch.testing.assert_close(first_scale(masked, True), first_scale(w[:, 3:], True))


@pytest.mark.parametrize("positive", [True, False])
def test_scales_of_activations_begin_with_the_smallest_squared_error(positive: bool) -> None:
    """Of values with a long tail on one side; ``2 <|x|> / sqrt(high)`` is section 2.1 of Esser et al."""
    x = noise(64, 9).exp() if positive else noise(64, 9).exp() - 1.0
    low, high = (0, 15) if positive else (-8, 7)
    spec = ActivationSpec(non_negative=positive, bits=4, observer=LSQObserver(), learned="scale")
    ranges = spec.observer.range_of(x, spec.quant_max, positive)[None]
    first = float(initial_values([spec], qparams_of([spec], ranges))["activation 0: scale"])

    def error(scale: float) -> float:
        return float(((x / scale).round().clamp(low, high) * scale - x).square().mean())

    paper = 2 * float(x.abs().mean()) / high**0.5
    assert error(first) < error(paper)
    assert error(first) <= 1.05 * min(error(k * paper) for k in torch.linspace(0.3, 6.0, 400).tolist())


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        (ActivationSpec(bits=4, learned="scale"), {"scale": 0.13}),
        (ActivationSpec(non_negative=True, bits=8, learned="scale"), {"scale": -0.013}),
        (ActivationSpec(bits=4, learned="scale and offset"), {"scale": 0.13, "offset": -0.71}),
        (ActivationSpec(non_negative=True, bits=4, learned="clip"), {"clip": 1.3}),
    ],
)
def test_what_is_learned_computes_the_same_without_a_gradient(spec, values) -> None:
    """Training, evaluation and export have the same quantization parameters."""
    x = noise(64, 64)
    learned = {name: torch.tensor(values[quantity]) for quantity, name in names_of(0, spec).items()}
    scale = learned_qparams_of(learned, 0, spec)
    assert scale is not None
    assert torch.equal(fake_quantize(x, scale), fake_quantize_learned(x, spec, *learned.values()))


@pytest.mark.parametrize("scale", [0.1, 0.0173, 1e-6, 3.0])
def test_it_computes_what_the_operation_of_torch_computes(scale) -> None:
    x = noise(100_000) * 20 * scale
    assert torch.equal(
        fake_quantize(x, QParams(scale, 8, 15)), torch.fake_quantize_per_tensor_affine(x, scale, 8, 0, 15)
    )
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    fake_quantize(ours, QParams(scale, 100, 255)).sum().backward()
    torch.fake_quantize_per_tensor_affine(theirs, scale, 100, 0, 255).sum().backward()
    assert (ours.grad != theirs.grad).sum() <= 2  # type: ignore[union-attr]  # exactly half a step beyond the end


@pytest.mark.parametrize("recipe", [LSQ(), LSQ(offset=True), PACT()])
def test_values_of_a_recipe(recipe) -> None:
    spec = recipe.spec()
    assert (spec.weight.quant_min, spec.weight.quant_max) == ((-8, 7) if isinstance(recipe, LSQ) else (-7, 7))
    assert spec.activation is not None
    assert spec.activation.quant_max == 15
    assert "4 bits" in str(spec.no_kernel)
