"""Recipes, observers and what a plan makes of them."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

from lightning_light.encoding import decode, encode
from lightning_light.errors import LightningLightError, ManifestError, TargetError
from lightning_light.example_input import ExampleInput
from lightning_light.quantization import (
    LSQ,
    PACT,
    Binary,
    DynamicObserver,
    Int8,
    IntN,
    MinMax,
    MixedPrecision,
    MovingAverage,
    MSEObserver,
    Observer,
    Percentile,
    Recipe,
    Ternary,
    fake_quantized,
    quantize,
)
from lightning_light.quantization.checkpoint_state import attach_fake_quantizer, begin
from lightning_light.quantization.fake_quantize import fake_quantize_dynamic, fake_quantize_weight, quantize_weight
from lightning_light.quantization.fake_quantizer import RangeObserver
from lightning_light.quantization.observers import LSQObserver
from lightning_light.quantization.plan import QuantizationPlan
from lightning_light.quantization.specs import ActivationSpec, WeightSpec
from lightning_light.surgery.attachment import state_of
from lightning_light.surgery.manifest import plain_copy
from tests.quantization.helpers import calibrated, plan_of
from tests.zoo import ZOO, noise

RECIPES = [
    IntN(4, 8),
    IntN(2, 8),
    IntN(4, 4),
    IntN(4, None),
    IntN(8, 8, observer=DynamicObserver()),
    Int8(per_channel=False),
    Int8(observer=Percentile(0.99)),
    Int8(observer=MSEObserver()),
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
    MixedPrecision(default=LSQ(), first=Int8(), last=Int8()),
    MixedPrecision({"conv*": IntN(4, 8)}, exclude="fc"),
]


class TestWeights:
    """Integers and scales, in float64."""

    @given(bits=st.integers(2, 8), seed=st.integers(0, 99))
    def test_uniform(self, bits, seed) -> None:
        w = torch.randn(5, 12, generator=torch.Generator().manual_seed(seed))
        high = 2 ** (bits - 1) - 1
        q, s = quantize_weight(w, IntN(bits).spec().weight)
        right = w.double().abs().amax(1) / high
        torch.testing.assert_close(s.double(), right)
        assert int(q.abs().max()) == high
        assert (q.double() - w.double() / right[:, None]).abs().max() <= 0.5 + 1e-4

    def test_ternary(self) -> None:
        """Equations 3 to 6 of Li et al., for each channel."""
        w = noise(4, 50)
        q, s = quantize_weight(w, Ternary().spec().weight)
        for row, found, scale in zip(w.double(), q, s, strict=True):
            delta = 0.7 * row.abs().mean()
            kept = row.abs() > delta
            assert torch.equal(found.double(), torch.where(kept, row.sign(), 0.0))
            assert float(scale) == pytest.approx(float(row.abs()[kept].mean()))

    def test_binary(self) -> None:
        """Equation 6 of Rastegari et al.: ``B = sign(W)``, ``alpha = |W|_1 / n``; a filter at a time."""
        w = noise(4, 3, 5, 5)
        quantized = fake_quantize_weight(w, Binary().spec().weight)[0]
        for row, found in zip(w.double(), quantized.double(), strict=True):
            torch.testing.assert_close(found, row.sign() * row.abs().sum() / 75)

    @pytest.mark.parametrize("recipe", [IntN(3), Ternary(), Binary(), LSQ(), Int8()])
    def test_what_a_mask_has_made_zero_stays_zero(self, recipe) -> None:
        w = noise(6, 10).abs() + 0.5
        w[:, ::2] = 0.0
        rule = recipe.spec().weight
        q, s = quantize_weight(w, rule, torch.full((6,), 0.3) if rule.learned else None)
        assert (q[w == 0] == 0).all()
        if rule.form != "uniform":
            torch.testing.assert_close(s, quantize_weight(w[:, 1::2], rule)[1], msg="nor does it count in a mean")

    def test_gradients(self) -> None:
        w = torch.tensor([[-1.5, -0.2, 0.4, 1.2]], requires_grad=True)
        fake_quantize_weight(w, Ternary().spec().weight)[0].sum().backward()
        assert w.grad is not None
        assert w.grad.tolist() == [[1.0] * 4]
        w.grad = None
        fake_quantize_weight(w, Binary().spec().weight)[0].sum().backward()
        assert w.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]

    def test_one_scale_a_layer_keeps_the_number_of_distinct_values(self) -> None:
        centroids = noise(16)
        w = centroids[torch.randint(16, (8, 64), generator=torch.Generator().manual_seed(0))]
        kept = fake_quantize_weight(w, Int8(per_channel=False).spec().weight)[0].unique().numel()
        assert kept <= 16 < fake_quantize_weight(w, Int8().spec().weight)[0].unique().numel()


class TestObservers:
    """The range of one batch."""

    @pytest.mark.parametrize("observer", [MovingAverage(), MinMax()])
    def test_ends(self, observer) -> None:
        x = noise(100)
        assert observer.range_of(x, 255, False).tolist() == [float(x.min()), float(x.max())]

    @pytest.mark.parametrize("fraction", [0.9, 0.99, 0.999])
    def test_percentile(self, fraction) -> None:
        x = noise(20_000)
        found = Percentile(fraction).range_of(x, 255, False).double()
        right = torch.quantile(x.double(), torch.tensor([1 - fraction, fraction]).double())
        torch.testing.assert_close(found, right, atol=2 * float(x.max() - x.min()) / 2048, rtol=0.0)

    @pytest.mark.parametrize("bits", [2, 4, 8])
    @pytest.mark.parametrize("positive", [True, False])
    def test_mse(self, bits, positive) -> None:
        """No shrunken range has a smaller error; on the values themselves, in float64."""
        x = noise(5000).abs() if positive else noise(5000) * 0.7 + 0.3
        high = 2**bits - 1

        def error(low: float, top: float) -> float:
            scale = (top - low) / high
            zero = round(-low / scale)
            quantized = ((x.double() / scale).round() + zero).clamp(0, high).sub(zero) * scale
            return float((quantized - x.double()).square().mean())

        low, top = MSEObserver().range_of(x, high, positive).tolist()
        ends = (0.0 if positive else float(x.min()), float(x.max()))
        best = min(error(ends[0] * part / 64, ends[1] * part / 64) for part in range(1, 65))
        assert error(low, top) <= 1.02 * best

    @pytest.mark.parametrize(
        "observer", [MovingAverage(), MinMax(), Percentile(), MSEObserver(), LSQObserver(), DynamicObserver()]
    )
    @pytest.mark.parametrize("x", [torch.zeros(5), torch.full((5,), -2.0), torch.tensor([3.0])])
    def test_numbers_without_a_range(self, observer, x) -> None:
        found = observer.range_of(x, 255, False)
        assert found.isfinite().all()
        assert decode(Observer, encode(observer), "observer") == observer

    def test_at_run_time(self) -> None:
        x = noise(50).requires_grad_()
        scale = float(noise(50).max() - noise(50).min()) / 15
        quantized = fake_quantize_dynamic(x, ActivationSpec(bits=4, observer=DynamicObserver()))
        assert (quantized - x).abs().max() <= scale * 0.501 + scale / 2  # the zero point is quantized too
        quantized.sum().backward()
        assert x.grad is not None
        assert (x.grad == 1).all()


class TestPlans:
    """Which tensors are quantized."""

    def test_an_input_of_few_bits_is_quantized_for_its_layer_alone(self) -> None:
        plan = plan_of(ZOO["residual"](), *ZOO["residual"]().example[0], recipe=LSQ())
        assert all(site.no_kernel for site in plan.layers.values())
        assert set(plan.layers) == set(plan.inputs)
        assert not plan.outputs
        assert len(plan.activations) == len(plan.layers)
        assert not plan.activations[0].non_negative
        assert any(spec.non_negative for spec in plan.activations)

    def test_weights_alone(self) -> None:
        plan = plan_of(ZOO["plain"](), noise(2, 3, 8, 8), recipe=IntN(4, None))
        assert not plan.activations
        assert all(site.no_kernel for site in plan.layers.values())

    def test_fewer_bits_for_weights_run_on_int8_kernels(self) -> None:
        for recipe in (IntN(4, 8), Ternary(), Binary(), LSQ(8, 8), PACT(4, 8)):
            plan = plan_of(ZOO["plain"](), noise(2, 3, 8, 8), recipe=recipe)
            assert not any(site.no_kernel for site in plan.layers.values())

    def test_mixed(self) -> None:
        recipe = MixedPrecision({"conv2": IntN(4, 8), "conv*": IntN(6, 8)}, default=Int8(), exclude="fc")
        plan = plan_of(ZOO["plain"](), noise(2, 3, 8, 8), recipe=recipe)
        bits = {op.module: site.weight.bits for op, site in plan.layers.items()}
        assert bits == {"conv1": 6, "conv2": 4}, "the first pattern that names a layer decides"
        assert plan.left_float == {"fc": "excluded by the recipe"}
        ends = MixedPrecision(default=LSQ(), first=Int8(), last=Int8())
        plan = plan_of(ZOO["plain"](), noise(2, 3, 8, 8), recipe=ends)
        bits = {op.module: site.weight.bits for op, site in plan.layers.items()}
        assert bits == {"conv1": 8, "conv2": 4, "fc": 8}
        assert [op.module for op, site in plan.layers.items() if site.no_kernel] == ["conv2"]

    def test_a_clip_is_learned_only_behind_a_relu(self) -> None:
        plan = plan_of(ZOO["plain"](), noise(2, 3, 8, 8), recipe=PACT())
        assert [(spec.non_negative, spec.learned) for spec in plan.activations] == [
            (False, ""),
            (True, "clip"),
            (True, "clip"),
        ]

    @pytest.mark.parametrize("recipe", RECIPES, ids=repr)
    def test_a_plan_survives_encoding(self, recipe) -> None:
        plan = plan_of(ZOO["squeeze_excite"](), *ZOO["squeeze_excite"]().example[0], recipe=plain_net(recipe))
        assert decode(QuantizationPlan, plain_copy(encode(plan), "plan"), "plan") == plan


def plain_net(recipe: Recipe) -> Recipe:
    """The patterns of `RECIPES` are those of one net."""
    return Int8() if isinstance(recipe, MixedPrecision) and recipe.layers else recipe


@pytest.mark.parametrize("recipe", RECIPES, ids=repr)
def test_every_recipe_quantizes_and_lists_what_has_no_kernel(recipe) -> None:
    """Layers with int8 kernels agree within three quantization steps."""
    torch.manual_seed(0)
    net = ZOO["plain"]().eval()
    images = noise(4, 3, 8, 8)
    with torch.no_grad():
        right = net(images)
        quantizer = calibrated(net, ExampleInput((images,)), recipe)
        quantized = net(images)
        assert not torch.equal(right, quantized)
        if quantizer.engine in torch.backends.quantized.supported_engines:
            with quantizer.quantized_ops(lambda: net(images), quantizer.engine) as kernels:
                found = net(images)
            sites = quantizer.plan.layers.items()
            expected = {op.module: site.no_kernel for op, site in sites if site.no_kernel}
            assert kernels.left_float == {**expected, **quantizer.plan.left_float}
            assert kernels.layers == len(quantizer.plan.layers) - len(expected)
            step = float(kernels.output_scales) or 0.02
            assert (found - quantized).abs().max() <= 3.1 * step
    quantizer.remove()


def test_a_stage_of_a_bit_width_schedule_has_more_bits() -> None:
    spec = IntN(4, 4).spec()
    assert (
        spec.weight.with_min_bits(6).quant_min,
        spec.weight.with_min_bits(6).quant_max,
        spec.weight.with_min_bits(2),
    ) == (
        -31,
        31,
        spec.weight,
    )
    assert LSQ().spec().weight.with_min_bits(6).quant_min == -32
    assert Ternary().spec().weight.with_min_bits(8) == Ternary().spec().weight
    assert spec.activation is not None
    assert [spec.activation.with_min_bits(bits).quant_max for bits in (8, 6, 4, 2)] == [255, 63, 15, 15]
    net, state = ZOO["plain"]().eval(), {}  # type: ignore[var-annotated]
    begin(state, net, ExampleInput((noise(2, 3, 8, 8),)), IntN(4, 4))
    quantizer = attach_fake_quantizer(net, state)
    assert quantizer is not None
    quantizer.observing = True
    net(noise(2, 3, 8, 8))
    quantizer.observing, quantizer.enabled = False, True
    ranges = quantizer.observer.take(torch.device("cpu"))
    errors = []
    with torch.no_grad():
        for min_bits in (8, 6, 4):
            quantizer.update(ranges, min_bits)
            errors.append(float((net(noise(2, 3, 8, 8)) - plain(net, quantizer)).square().mean()))
    assert errors == sorted(errors)
    assert errors[0] < 0.1 * errors[2]


def plain(net: nn.Module, quantizer: Any) -> Tensor:
    quantizer.enabled = False
    found: Tensor = net(noise(2, 3, 8, 8))
    quantizer.enabled = True
    return found


@pytest.mark.parametrize("recipe", [*RECIPES, Int8(engine="onnx", exclude=["head"])], ids=repr)
def test_a_recipe_prints_as_the_call_that_makes_it(recipe) -> None:
    import lightning_light.quantization as package

    assert eval(repr(recipe), vars(package).copy()) == recipe


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: IntN(9), r"`IntN\(weights=9\)`: expected 2 <= weights <= 8"),
        (lambda: LSQ(4, 1), r"`LSQ\(activations=1\)`"),
        (lambda: Percentile(0.4), "expected 0.5 < fraction < 1"),
        (lambda: MSEObserver(momentum=0.0), "expected 0 < momentum <= 1"),
        (lambda: MixedPrecision({"*": Int8(exclude="fc")}), "neither mixed nor exclude"),
        (lambda: MixedPrecision({"*": MixedPrecision()}), "neither mixed nor exclude"),
        (
            lambda: MixedPrecision(default=Int8(engine="x86"), last=Int8()),
            r"for one engine, found \['qnnpack', 'x86'\]",
        ),
    ],
)
def test_bad_values_are_refused_where_they_are_written(make, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()
    with pytest.raises(TypeError, match="of string to Recipe, found int 8"):
        MixedPrecision({"*": 8})  # type: ignore[dict-item]
    with pytest.raises(TargetError):
        MixedPrecision({"nowhere.*": Int8()}).specs(ZOO["plain"](), [])


def test_widths_are_those_of_the_engine() -> None:
    assert Int8(engine="x86").spec().weight.quant_max == 63
    assert all(Int8(engine=engine).spec().weight.quant_max == 127 for engine in ("qnnpack", "xnnpack", "onnx"))
    assert Int8(engine="x86", reduce_range=False).spec().weight == Int8().spec().weight
    assert Int8(engine="onnx", reduce_range=True).spec().weight == Int8(engine="x86").spec().weight
    assert LSQ(8, 8, engine="x86").spec().weight == WeightSpec(8, -63, 63, learned=True)
    assert math.isnan(float(RangeObserver([ActivationSpec(observer=MinMax())]).momentum))


@dataclass(frozen=True)
class Halved(Observer):
    """A user's own."""

    part: float = 0.5
    momentum: float | None = 0.1

    def range_of(self, x: Tensor, quant_max: int, non_negative: bool) -> Tensor:
        return torch.stack(torch.aminmax(x)) * self.part


def test_an_observer_of_the_users_own_is_found_again() -> None:
    net = quantize(ZOO["plain"]().eval(), noise(2, 3, 8, 8), Int8(observer=Halved(0.25)))
    activations = state_of(net).state["quantization_aware_training"]["plan"]["activations"]
    assert {spec["observer"]["kind"] for spec in activations} == {f"{__name__}.Halved"}
    assert decode(Observer, activations[0]["observer"], "observer") == Halved(0.25)
    with fake_quantized(net):
        net(noise(2, 3, 8, 8))
    with pytest.raises(LightningLightError, match=r"observer `yours\.Lost`: .*Import the module that defines it"):
        decode(Observer, {"kind": "yours.Lost", "momentum": 0.1}, "observer")


DAMAGES: dict[str, Any] = {
    r"quantization_aware_training\.plan\.activations\[0\]\.bits": lambda s: s["plan"]["activations"][0].update(
        bits="8"
    ),
    r"quantization_aware_training\.plan\.activations\[0\]\.learned": lambda s: s["plan"]["activations"][0].update(
        learned="all"
    ),
    r"quantization_aware_training\.plan`: expected the key 'layers'": lambda s: s["plan"].pop("layers"),
    r"quantization_aware_training\.plan\.outputs": lambda s: s["plan"].update(outputs=[1, 2]),
    r"quantization_aware_training\.ranges`: expected a tensor of shape \(4, 2\)": lambda s: s.update(
        ranges=torch.zeros(3, 2)
    ),
    r"quantization_aware_training\.enabled`: expected bool, found 1": lambda s: s.update(enabled=1),
}


@pytest.mark.parametrize("sentence", DAMAGES)
def test_a_damaged_state_is_refused_by_the_name_of_its_part(sentence) -> None:
    net = quantize(ZOO["plain"]().eval(), noise(2, 3, 8, 8), Int8())
    DAMAGES[sentence](state_of(net).state["quantization_aware_training"])
    with pytest.raises(ManifestError, match=sentence), fake_quantized(net):
        pass
