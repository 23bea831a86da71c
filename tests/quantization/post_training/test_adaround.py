"""AdaRound against the formulas of Nagel et al. (2020), restated here in float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor

from lightning_light.quantization.fake_quantize import fake_quantize_weight, quantize_weight
from lightning_light.quantization.post_training.refinement import (
    AdaRound,
    dequantized,
    learn_rounding,
    logits_of,
    rectified_sigmoid,
    regularizer,
)
from lightning_light.quantization.specs import WeightSpec
from tests.zoo import noise

QUICK = AdaRound(steps=300, learning_rate=0.05)


def rule(high: int, per_channel: bool = True) -> WeightSpec:
    return WeightSpec(high.bit_length() + 1, -high, high, per_channel=per_channel)


def learned(weight: Tensor, high: int, x: Tensor, settings: AdaRound = QUICK) -> Tensor:
    return learn_rounding(weight, rule(high), [(x, x @ weight.T)], F.linear, -1, settings)


def test_rectified_sigmoid_is_equation_23_of_the_paper() -> None:
    v = torch.linspace(-6, 6, 101, dtype=torch.float64)
    sigmoid = 1 / (1 + torch.exp(-v))
    torch.testing.assert_close(
        rectified_sigmoid(v), torch.clip(sigmoid * (1.1 - -0.1) + -0.1, 0, 1), rtol=1e-12, atol=0
    )
    h = torch.linspace(0.001, 0.999, 99, dtype=torch.float64)
    torch.testing.assert_close(rectified_sigmoid(logits_of(h)), h, rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(beta=st.floats(2, 20))
def test_the_regularizer_is_equation_24(beta) -> None:
    h = torch.linspace(0, 1, 21, dtype=torch.float64)
    right = sum(1 - abs(2 * float(one) - 1) ** beta for one in h)
    assert float(regularizer(h, beta)) == pytest.approx(right)
    assert float(regularizer(h.round(), beta)) == 0.0


def test_beta_falls_along_a_cosine_after_the_warm_up() -> None:
    found = AdaRound(steps=200, warm_up=0.1, beta=(20.0, 2.0))
    assert found.beta_at(19) is None
    for step in range(20, 200):
        progress = (step - 20) / 180
        assert found.beta_at(step) == pytest.approx(2 + 18 * 0.5 * (1 + math.cos(math.pi * progress)))


def test_it_comes_close_to_the_best_of_all_roundings() -> None:
    """One channel of twelve weights, inputs with a mean, so that errors can cancel: all 2^12 ways are tried."""
    best = nearest = found = 0.0
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        weight, x = torch.randn(1, 12, generator=generator), torch.randn(64, 12, generator=generator) * 0.3 + 1
        scale = weight.abs().max() / 3
        ways = torch.tensor(list(itertools.product((0.0, 1.0), repeat=12)))
        quantized = torch.cat(
            [
                ((weight / scale).floor() + ways).clamp(-3, 3) * scale,
                (weight / scale).round() * scale,
                learned(weight, 3, x),
            ]
        )
        errors = (x.double() @ (quantized - weight).double().T).square().mean(0)
        best, nearest, found = best + float(errors.min()), nearest + float(errors[-2]), found + float(errors[-1])
    assert found <= nearest / 3
    assert found <= 1.2 * best


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    high=st.sampled_from([1, 3, 7, 63, 127]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    per_channel=st.booleans(),
)
def test_plain_rounding_gives_what_was_learned_to_the_last_bit(seed, high, dtype, per_channel) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(5, 12, generator=generator) * torch.rand(5, 1, generator=generator)).to(dtype).float()
    largest = weight.abs().amax(1, keepdim=True) if per_channel else weight.abs().amax().reshape(1, 1)
    scale = largest / high
    q = ((weight / scale).floor() + torch.randint(0, 2, weight.shape, generator=generator)).clamp(-high, high)
    q = torch.where(weight.abs() == largest, weight.sign() * high, q)
    written = dequantized(q, largest, high).to(dtype)
    found, step = quantize_weight(written, rule(high, per_channel))
    assert torch.equal(found, q)
    assert torch.equal(step, quantize_weight(weight.to(dtype), rule(high, per_channel))[1]), "the scale is the same"
    again = fake_quantize_weight(written, rule(high, per_channel))[0]
    assert torch.equal(again, fake_quantize_weight(again, rule(high, per_channel))[0])


def test_weights_stay_next_to_where_they_were_and_zeros_are_zeros() -> None:
    weight = noise(6, 20)
    weight[:, ::3] = 0.0
    weight[2] = 0.0
    found = learned(weight, 7, noise(32, 20))
    scale = weight.abs().amax(1, keepdim=True) / 7
    assert ((found - weight).abs() <= scale * 1.001).all()
    assert (found[weight == 0] == 0).all()
    assert torch.equal(found.abs().amax(1), weight.abs().amax(1))


def test_one_seed_is_one_result() -> None:
    weight, x = noise(4, 20), noise(64, 20)
    first = learned(weight, 3, x, AdaRound(steps=50, batch_size=8))
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert torch.equal(first, learned(weight, 3, x, AdaRound(steps=50, batch_size=8)))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"steps": 0}, r"AdaRound\(steps=0\)`: expected an integer >= 1"),
        ({"learning_rate": 0.0}, "expected a number > 0"),
        ({"warm_up": 1.0}, "0 <= warm_up < 1"),
        ({"beta": (2.0, 20.0)}, "two exponents that fall"),
    ],
)
def test_wrong_values_are_refused(wrong, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        AdaRound(**wrong)
