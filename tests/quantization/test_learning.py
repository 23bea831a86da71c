"""LSQ, LSQ+, PACT and straight-through rounding against their papers' formulas, restated here in float64."""

import pytest
import torch
from torch import Tensor

from lightning_light.quantization import LSQ, PACT
from lightning_light.quantization.learning import learned_activation, on_grid
from lightning_light.quantization.observers import StepSize
from lightning_light.quantization.parameters import first_step, first_values, learned_scale
from lightning_light.quantization.rounding import round_activation, round_weight, scales_of
from lightning_light.quantization.rules import Grid, WeightRule
from tests.zoo import noise


def other(*shape: int) -> Tensor:
    """Numbers that have nothing to do with `noise`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def away_from_ties(x: Tensor, scale: float) -> Tensor:
    """A tie in float64 need not be one in float32."""
    return x[((x.double() / scale) % 1 - 0.5).abs() > 1e-3]


def esser(v: Tensor, s: float, low: int, high: int, weights: Tensor) -> tuple[Tensor, Tensor, float]:
    """Equations 1 to 3 and section 2.2: the rounded numbers, the gradients to them and to ``s``."""
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
    rounded = round_weight(w, WeightRule(0, low, high, per_channel=False, learned=True), s)
    (rounded * upstream).sum().backward()
    right, of_w, of_s = esser(w.detach(), step, low, high, upstream.double())
    assert w.grad is not None
    assert s.grad is not None
    torch.testing.assert_close(rounded.double(), right, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(w.grad.double(), of_w)
    assert float(s.grad) == pytest.approx(of_s / (len(w) * high) ** 0.5, rel=1e-4)


def test_every_channel_has_its_own_step_and_gradient() -> None:
    w, rule = noise(4, 3, 3, 3).requires_grad_(), WeightRule(4, -8, 7, learned=True)
    steps = torch.tensor([0.05, 0.1, 0.2, 0.4], requires_grad=True)
    (round_weight(w, rule, steps) * other(4, 3, 3, 3)).sum().backward()
    for channel in range(4):
        one = steps.detach()[channel].clone().requires_grad_()
        alone = round_weight(w.detach()[channel], WeightRule(4, -8, 7, per_channel=False, learned=True), one)
        (alone * other(4, 3, 3, 3)[channel]).sum().backward()
        torch.testing.assert_close(steps.grad[channel], one.grad)  # type: ignore[index]


@pytest.mark.parametrize("positive", [True, False])
def test_lsq_of_numbers_counts_those_of_one_sample(positive) -> None:
    grid = Grid(positive=positive, bits=4, learned="step")
    low, high = (0, 15) if positive else (-8, 7)
    x = noise(2, 3, 8, 8).abs() if positive else noise(2, 3, 8, 8)
    s = torch.tensor(0.09, requires_grad=True)
    learned_activation(x, grid, s).sum().backward()
    _, _, of_s = esser(x, 0.09, low, high, torch.ones(x.shape).double())
    assert float(s.grad) == pytest.approx(of_s / (3 * 8 * 8 * high) ** 0.5, rel=1e-3)  # type: ignore[arg-type]


def test_lsq_plus() -> None:
    """Equations 3 to 5 of Bhalgat et al., with the offset on the grid: ``x_hat = round(clamp((x - b) / s)) s + b``."""
    step, zero, high = 0.1, 4, 15
    beta = -step * zero
    x = away_from_ties(noise(4000), step).requires_grad_()
    s, b = torch.tensor(step, requires_grad=True), torch.tensor(beta, requires_grad=True)
    upstream = other(len(x)).double()
    rounded = learned_activation(x, Grid(bits=4, learned="step and offset"), s, b)
    (rounded.double() * upstream).sum().backward()
    v = (x.detach().double() - beta) / step
    right = torch.round(v).clamp(0, high) * step + beta
    inside = (v > 0) & (v < high)
    of_s = torch.where(inside, torch.round(v) - v, torch.where(v > 0, float(high), 0.0))
    share = (1 * high) ** -0.5  # a sample has one number here
    torch.testing.assert_close(rounded.detach().double(), right, atol=1e-5, rtol=1e-5)
    assert s.grad is not None
    assert b.grad is not None
    assert float(s.grad) == pytest.approx(float((upstream * of_s).sum()) * share, rel=1e-4)
    assert float(b.grad) == pytest.approx(float((upstream * ~inside).sum()) * share, rel=1e-4)


def test_pact() -> None:
    """Equations 1 to 3 of Choi et al."""
    alpha, k = 0.9, 4
    x = away_from_ties(noise(4000), alpha / 15).requires_grad_()
    a = torch.tensor(alpha, requires_grad=True)
    upstream = other(len(x))
    rounded = learned_activation(x, Grid(positive=True, bits=k, learned="clip"), a)
    (rounded * upstream).sum().backward()
    y = 0.5 * (x.detach().double().abs() - (x.detach().double() - alpha).abs() + alpha)
    right = torch.round(y * (2**k - 1) / alpha) * alpha / (2**k - 1)
    torch.testing.assert_close(rounded.detach().double(), right, atol=1e-5, rtol=1e-5)
    assert float(a.grad) == pytest.approx(float(upstream[x >= alpha].sum()), rel=1e-4)  # type: ignore[arg-type]
    assert torch.equal(x.grad != 0, (x > 0) & (x < alpha))  # type: ignore[operator]


def test_first_step_sizes() -> None:
    """``2 <|v|> / sqrt(high)``: section 2.1 of Esser et al."""
    w = noise(4, 9)
    torch.testing.assert_close(first_step(w, 7, True).double(), 2 * w.double().abs().mean(1) / 7**0.5)
    torch.testing.assert_close(first_step(w, 7, False).double(), 2 * w.double().abs().mean() / 7**0.5)
    masked = w.clone()
    masked[:, :3] = 0.0
    torch.testing.assert_close(first_step(masked, 7, True), first_step(w[:, 3:], 7, True))
    for positive, high in ((True, 15), (False, 7)):
        grid = Grid(positive=positive, bits=4, observer=StepSize(), learned="step")
        ranges = grid.observer.extremes(w, grid.high, positive)[None]
        first = first_values([grid], scales_of([grid], ranges))["grid 0 step"]
        assert float(first) == pytest.approx(2 * float(w.abs().mean()) / high**0.5)


@pytest.mark.parametrize(
    ("grid", "values"),
    [
        (Grid(bits=4, learned="step"), {"step": 0.13}),
        (Grid(positive=True, bits=8, learned="step"), {"step": -0.013}),
        (Grid(bits=4, learned="step and offset"), {"step": 0.13, "offset": -0.71}),
        (Grid(positive=True, bits=4, learned="clip"), {"clip": 1.3}),
    ],
)
def test_what_is_learned_computes_the_same_without_a_gradient(grid, values) -> None:
    """Training, evaluation and export have one grid."""
    x = noise(64, 64)
    learned = {f"grid 0 {name}": torch.tensor(value) for name, value in values.items()}
    scale = learned_scale(learned, 0, grid)
    assert scale is not None
    assert torch.equal(round_activation(x, *scale, grid.high), learned_activation(x, grid, *learned.values()))


@pytest.mark.parametrize("scale", [0.1, 0.0173, 1e-6, 3.0])
def test_vectors_give_what_torchs_own_operation_gives(scale) -> None:
    x = noise(100_000) * 20 * scale
    assert torch.equal(on_grid(x, scale, -8, 7), torch.fake_quantize_per_tensor_affine(x, scale, 8, 0, 15))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    on_grid(ours, scale, -100, 155).sum().backward()
    torch.fake_quantize_per_tensor_affine(theirs, scale, 100, 0, 255).sum().backward()
    assert (ours.grad != theirs.grad).sum() <= 2  # type: ignore[union-attr]  # exactly half a step beyond the end


@pytest.mark.parametrize("recipe", [LSQ(), LSQ(offset=True), PACT()])
def test_values_of_a_recipe(recipe) -> None:
    rule = recipe.rule()
    assert (rule.weight.low, rule.weight.high) == ((-8, 7) if isinstance(recipe, LSQ) else (-7, 7))
    assert rule.activation is not None
    assert rule.activation.high == 15
    assert "4 bits" in str(rule.lacks_kernel)
