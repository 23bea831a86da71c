"""Recipes, observers and what a plan makes of them."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_light.errors import LightningLightError, TargetError
from lightning_light.example_input import ExampleInput
from lightning_light.quantization import (
    LSQ,
    MSE,
    PACT,
    AtRunTime,
    Binary,
    Int8,
    IntN,
    MinMax,
    Mixed,
    MovingAverage,
    Observer,
    Percentile,
    Recipe,
    Ternary,
    fake_quantized,
    quantize,
)
from lightning_light.quantization.observers import StepSize, observer_of
from lightning_light.quantization.plan import Plan
from lightning_light.quantization.rounding import integers, round_at_run_time, round_weight
from lightning_light.quantization.rules import Grid, WeightRule
from lightning_light.quantization.state import attach_from, begin
from lightning_light.surgery.attachment import state_of
from tests.quantization.test_plan import calibrated, plan_of
from tests.zoo import ZOO, noise

RECIPES = [
    IntN(4, 8),
    IntN(2, 8),
    IntN(4, 4),
    IntN(4, None),
    IntN(8, 8, observer=AtRunTime()),
    Int8(per_channel=False),
    Int8(observer=Percentile(0.99)),
    Int8(observer=MSE()),
    Int8(observer=MinMax()),
    Ternary(),
    Ternary(None),
    Binary(),
    LSQ(),
    LSQ(8, 8),
    LSQ(8, 8, engine="x86"),
    LSQ(2, 4, offset=True),
    LSQ(4, None),
    PACT(),
    PACT(8, 8),
    Mixed(default=LSQ(), first=Int8(), last=Int8()),
    Mixed({"conv*": IntN(4, 8)}, keep_float="fc"),
]


class TestWeights:
    """Whole numbers and scales, in float64."""

    @given(bits=st.integers(2, 8), seed=st.integers(0, 99))
    def test_uniform(self, bits, seed) -> None:
        w = torch.randn(5, 12, generator=torch.Generator().manual_seed(seed))
        high = 2 ** (bits - 1) - 1
        q, s = integers(w, IntN(bits).rule().weight)
        right = w.double().abs().amax(1) / high
        torch.testing.assert_close(s.double(), right)
        assert int(q.abs().max()) == high
        assert (q.double() - w.double() / right[:, None]).abs().max() <= 0.5 + 1e-4

    def test_ternary(self) -> None:
        """Equations 3 to 6 of Li et al., for each channel."""
        w = noise(4, 50)
        q, s = integers(w, Ternary().rule().weight)
        for row, found, scale in zip(w.double(), q, s, strict=True):
            delta = 0.7 * row.abs().mean()
            kept = row.abs() > delta
            assert torch.equal(found.double(), torch.where(kept, row.sign(), 0.0))
            assert float(scale) == pytest.approx(float(row.abs()[kept].mean()))

    def test_binary(self) -> None:
        """Equation 6 of Rastegari et al.: ``B = sign(W)``, ``alpha = |W|_1 / n``; a filter at a time."""
        w = noise(4, 3, 5, 5)
        rounded = round_weight(w, Binary().rule().weight)
        for row, found in zip(w.double(), rounded.double(), strict=True):
            torch.testing.assert_close(found, row.sign() * row.abs().sum() / 75)

    @pytest.mark.parametrize("recipe", [IntN(3), Ternary(), Binary(), LSQ(), Int8()])
    def test_what_a_mask_has_made_zero_stays_zero(self, recipe) -> None:
        w = noise(6, 10).abs() + 0.5
        w[:, ::2] = 0.0
        rule = recipe.rule().weight
        q, s = integers(w, rule, torch.full((6,), 0.3) if rule.learned else None)
        assert (q[w == 0] == 0).all()
        if rule.form != "uniform":
            torch.testing.assert_close(s, integers(w[:, 1::2], rule)[1], msg="nor does it count in a mean")

    def test_gradients(self) -> None:
        w = torch.tensor([[-1.5, -0.2, 0.4, 1.2]], requires_grad=True)
        round_weight(w, Ternary().rule().weight).sum().backward()
        assert w.grad is not None
        assert w.grad.tolist() == [[1.0] * 4]
        w.grad = None
        round_weight(w, Binary().rule().weight).sum().backward()
        assert w.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]

    def test_one_scale_a_layer_keeps_the_number_of_distinct_values(self) -> None:
        centroids = noise(16)
        w = centroids[torch.randint(16, (8, 64), generator=torch.Generator().manual_seed(0))]
        kept = round_weight(w, Int8(per_channel=False).rule().weight).unique().numel()
        assert kept <= 16 < round_weight(w, Int8().rule().weight).unique().numel()


class TestObservers:
    """The range of one batch."""

    @pytest.mark.parametrize("observer", [MovingAverage(), MinMax()])
    def test_ends(self, observer) -> None:
        x = noise(100)
        assert observer.extremes(x, 255, False).tolist() == [float(x.min()), float(x.max())]

    @pytest.mark.parametrize("fraction", [0.9, 0.99, 0.999])
    def test_percentile(self, fraction) -> None:
        x = noise(20_000)
        found = Percentile(fraction).extremes(x, 255, False).double()
        right = torch.quantile(x.double(), torch.tensor([1 - fraction, fraction]).double())
        torch.testing.assert_close(found, right, atol=2 * float(x.max() - x.min()) / 2048, rtol=0.0)

    @pytest.mark.parametrize("bits", [2, 4, 8])
    @pytest.mark.parametrize("positive", [True, False])
    def test_mse(self, bits, positive) -> None:
        """No shrunken range has a smaller error; on the numbers themselves, in float64."""
        x = noise(5000).abs() if positive else noise(5000) * 0.7 + 0.3
        high = 2**bits - 1

        def error(low: float, top: float) -> float:
            scale = (top - low) / high
            zero = round(-low / scale)
            rounded = ((x.double() / scale).round() + zero).clamp(0, high).sub(zero) * scale
            return float((rounded - x.double()).square().mean())

        low, top = MSE().extremes(x, high, positive).tolist()
        ends = (0.0 if positive else float(x.min()), float(x.max()))
        best = min(error(ends[0] * part / 64, ends[1] * part / 64) for part in range(1, 65))
        assert error(low, top) <= 1.02 * best

    @pytest.mark.parametrize("observer", [MovingAverage(), MinMax(), Percentile(), MSE(), StepSize(), AtRunTime()])
    @pytest.mark.parametrize("x", [torch.zeros(5), torch.full((5,), -2.0), torch.tensor([3.0])])
    def test_numbers_without_a_range(self, observer, x) -> None:
        found = observer.extremes(x, 255, False)
        assert found.isfinite().all()
        assert observer_of(observer.plain()) == observer

    def test_at_run_time(self) -> None:
        x = noise(50).requires_grad_()
        scale = float(noise(50).max() - noise(50).min()) / 15
        rounded = round_at_run_time(x, Grid(bits=4, observer=AtRunTime()))
        assert (rounded - x).abs().max() <= scale * 0.501 + scale / 2  # the zero point is rounded, too
        rounded.sum().backward()
        assert x.grad is not None
        assert (x.grad == 1).all()


class TestPlans:
    """What is rounded where."""

    def test_what_reads_few_bits_is_rounded_for_the_layer_alone(self) -> None:
        plan = plan_of(ZOO["residual"](), *ZOO["residual"]().example[0], recipe=LSQ())
        assert set(plan.without_kernel) == set(plan.weights) == set(plan.arguments)
        assert not plan.outputs
        assert len(plan.grids) == len(plan.weights)
        assert not plan.grids[0].positive
        assert any(grid.positive for grid in plan.grids)

    def test_weights_alone(self) -> None:
        plan = plan_of(ZOO["plain"](), noise(2, 3, 8, 8), recipe=IntN(4, None))
        assert not plan.grids
        assert set(plan.without_kernel) == set(plan.weights)

    def test_fewer_bits_for_weights_run_on_int8_kernels(self) -> None:
        for recipe in (IntN(4, 8), Ternary(), Binary(), LSQ(8, 8), PACT(4, 8)):
            plan = plan_of(ZOO["plain"](), noise(2, 3, 8, 8), recipe=recipe)
            assert not plan.without_kernel
            assert plan.groups.keys() == plan.weights.keys()

    def test_mixed(self) -> None:
        recipe = Mixed({"conv2": IntN(4, 8), "conv*": IntN(6, 8)}, default=Int8(), keep_float="fc")
        plan = plan_of(ZOO["plain"](), noise(2, 3, 8, 8), recipe=recipe)
        bits = {key.split("|")[0]: rule.bits for key, rule in plan.weights.items()}
        assert bits == {"conv1": 6, "conv2": 4}, "the first pattern that names a layer decides"
        assert plan.left_float == {"fc": "asked for by `keep_float`"}
        ends = Mixed(default=LSQ(), first=Int8(), last=Int8())
        plan = plan_of(ZOO["plain"](), noise(2, 3, 8, 8), recipe=ends)
        bits = {key.split("|")[0]: rule.bits for key, rule in plan.weights.items()}
        assert bits == {"conv1": 8, "conv2": 4, "fc": 8}
        assert list(plan.without_kernel) == ["conv2|1|conv2d|1"]

    def test_a_clip_is_learned_only_behind_a_relu(self) -> None:
        plan = plan_of(ZOO["plain"](), noise(2, 3, 8, 8), recipe=PACT())
        assert [(grid.positive, grid.learned) for grid in plan.grids] == [(False, ""), (True, "clip"), (True, "clip")]

    @pytest.mark.parametrize("recipe", RECIPES, ids=repr)
    def test_a_plan_survives_plain_types(self, recipe) -> None:
        plan = plan_of(ZOO["squeeze_excite"](), *ZOO["squeeze_excite"]().example[0], recipe=plain_net(recipe))
        assert Plan.from_plain(plan.plain()) == plan


def plain_net(recipe: Recipe) -> Recipe:
    """The patterns of `RECIPES` are those of one net."""
    return Int8() if isinstance(recipe, Mixed) and recipe.layers else recipe


@pytest.mark.parametrize("recipe", RECIPES, ids=repr)
def test_every_recipe_rounds_and_says_what_no_kernel_computes(recipe) -> None:
    """What has kernels gives the same answers on them, within three steps of the output's grid."""
    torch.manual_seed(0)
    net = ZOO["plain"]().eval()
    images = noise(4, 3, 8, 8)
    with torch.no_grad():
        right = net(images)
        attachment = calibrated(net, ExampleInput((images,)), recipe)
        rounded = net(images)
        assert not torch.equal(right, rounded)
        if attachment.engine in torch.backends.quantized.supported_engines:
            with attachment.on_kernels(lambda: net(images), attachment.engine) as kernels:
                found = net(images)
            expected = {key.split("|")[0]: reason for key, reason in attachment.plan.without_kernel.items()}
            assert kernels.left_float == {**expected, **attachment.plan.left_float}
            assert kernels.layers == len(attachment.plan.weights) - len(expected)
            step = float(kernels.scales) or 0.02
            assert (found - rounded).abs().max() <= 3.1 * step
    attachment.let_go()


def test_a_rung_of_a_ladder_has_more_bits() -> None:
    rule = IntN(4, 4).rule()
    assert (rule.weight.at(6).low, rule.weight.at(6).high, rule.weight.at(2)) == (-31, 31, rule.weight)
    assert LSQ().rule().weight.at(6).low == -32
    assert Ternary().rule().weight.at(8) == Ternary().rule().weight
    assert rule.activation is not None
    assert [rule.activation.at(bits).high for bits in (8, 6, 4, 2)] == [255, 63, 15, 15]
    net, state = ZOO["plain"]().eval(), {}  # type: ignore[var-annotated]
    begin(state, net, ExampleInput((noise(2, 3, 8, 8),)), IntN(4, 4))
    attachment = attach_from(net, state)
    assert attachment is not None
    attachment.observing = True
    net(noise(2, 3, 8, 8))
    attachment.observing, attachment.form = False, "rounded"
    ranges = attachment.observed(torch.device("cpu"))
    errors = []
    with torch.no_grad():
        for at_least in (8, 6, 4):
            attachment.use(ranges, at_least)
            errors.append(float((net(noise(2, 3, 8, 8)) - plain(net, attachment)).square().mean()))
    assert errors == sorted(errors)
    assert errors[0] < 0.1 * errors[2]


def plain(net: nn.Module, attachment: Any) -> Tensor:
    form, attachment.form = attachment.form, "plain"
    found: Tensor = net(noise(2, 3, 8, 8))
    attachment.form = form
    return found


@pytest.mark.parametrize("recipe", [*RECIPES, Int8(engine="onnx", keep_float=["head"])], ids=repr)
def test_a_recipe_prints_as_the_call_that_makes_it(recipe) -> None:
    import lightning_light.quantization as wing

    assert eval(repr(recipe), vars(wing).copy()) == recipe


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: IntN(9), "an integer number of bits in"),
        (lambda: IntN(1), r"For one bit write `Binary\(\)`"),
        (lambda: LSQ(4, 1), r"`LSQ\(activations=1\)`"),
        (lambda: IntN(4.0), "an integer number of bits"),  # type: ignore[arg-type]
        (lambda: Percentile(0.4), "expected 0.5 < fraction < 1"),
        (lambda: MSE(share=0.0), "expected 0 < share <= 1"),
        (lambda: Mixed({"*": Int8(keep_float="fc")}), "nor keep layers float themselves|neither mixed nor keep"),
        (lambda: Mixed({"*": Mixed()}), "neither mixed nor keep"),
        (lambda: Mixed(default=Int8(engine="x86"), last=Int8()), r"for one engine, found \['qnnpack', 'x86'\]"),
    ],
)
def test_bad_values_are_refused_where_they_are_written(make, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()
    with pytest.raises(TypeError, match="expected recipes, found 8"):
        Mixed({"*": 8})  # type: ignore[dict-item]
    with pytest.raises(TargetError):
        Mixed({"nowhere.*": Int8()}).rules(ZOO["plain"](), [])


def test_widths_are_those_of_the_engine() -> None:
    assert {engine: Int8(engine=engine).rule().weight.high for engine in ("qnnpack", "x86", "xnnpack", "onnx")} == {  # type: ignore[arg-type]
        "qnnpack": 127,
        "x86": 63,
        "xnnpack": 127,
        "onnx": 127,
    }
    assert LSQ(8, 8, engine="x86").rule().weight == WeightRule(8, -63, 63, learned=True)
    assert math.isnan(
        float(calibrated(ZOO["plain"]().eval(), ExampleInput((noise(2, 3, 8, 8),)), Int8(observer=MinMax())).shares[0])
    )


@dataclass(frozen=True)
class Halved(Observer):
    """A user's own."""

    part: float = 0.5
    share: float | None = 0.1

    def extremes(self, x: Tensor, high: int, positive: bool) -> Tensor:
        return torch.stack(torch.aminmax(x)) * self.part


def test_an_observer_of_the_users_own_is_found_again() -> None:
    net = quantize(ZOO["plain"]().eval(), [noise(2, 3, 8, 8)], Int8(observer=Halved(0.25)))
    grids = state_of(net).state["quantization_aware_training"]["plan"]["grids"]
    assert {grid["observer"]["kind"] for grid in grids} == {f"{__name__}.Halved"}
    assert observer_of(grids[0]["observer"]) == Halved(0.25)
    with fake_quantized(net):
        net(noise(2, 3, 8, 8))
    with pytest.raises(LightningLightError, match=r"observer `yours\.Lost`: .*Import it before you load"):
        observer_of({"kind": "yours.Lost", "share": 0.1})
