"""Factors against the layer at full rank, and against the theory's optimum below it."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings, strategies as st
from torch import Tensor, nn

from lightning_light.criteria.collector import EvidenceCollector
from lightning_light.lowrank import RankRatio, factorize
from lightning_light.lowrank.build import build_factors, current_ranks, dense_weight
from lightning_light.lowrank.factors import Factors, compose
from lightning_light.lowrank.fits import ActivationSVD, FisherSVD, WhitenedSVD
from lightning_light.lowrank.spectra import decompose

CONVOLUTIONS = {
    "plain": (nn.Conv2d, (6, 8, 3), {"padding": 1}),
    "strided": (nn.Conv2d, (6, 8, 3), {"padding": 1, "stride": 2}),
    "uneven": (nn.Conv2d, (4, 10, (3, 5)), {"padding": (0, 2), "stride": (2, 1), "dilation": (1, 2)}),
    "grouped": (nn.Conv2d, (8, 12, 3), {"padding": 1, "groups": 4}),
    "grouped_strided": (nn.Conv2d, (8, 16, 3), {"stride": 2, "dilation": 2, "groups": 2, "bias": False}),
    "same": (nn.Conv2d, (5, 7, (3, 5)), {"padding": "same", "dilation": 2}),
    "valid": (nn.Conv2d, (5, 7, 3), {"padding": "valid"}),
    "reflect": (nn.Conv2d, (5, 7, 3), {"padding": 1, "padding_mode": "reflect", "stride": 2}),
    "circular": (nn.Conv2d, (5, 7, 5), {"padding": (2, 1), "padding_mode": "circular"}),
    "replicate": (nn.Conv2d, (5, 7, 3), {"padding": 2, "padding_mode": "replicate", "dilation": 2}),
    "point": (nn.Conv2d, (6, 9, 1), {"stride": 2}),
    "one_dimension": (nn.Conv1d, (6, 8, 5), {"padding": 2, "stride": 2}),
    "three_dimensions": (nn.Conv3d, (4, 6, 3), {"padding": 1, "stride": (1, 2, 1)}),
}
EXACT = {torch.float32: 1e-5, torch.float64: 1e-10}


def images(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    dims = len(layer.kernel_size)
    return torch.randn(2, layer.in_channels, *(11, 12, 9)[:dims], dtype=dtype)


def grouped(layer: nn.Module) -> Tensor:
    return dense_weight(layer)


def factored(layer: nn.Module, form: str, ranks: tuple[int, ...] | None = None) -> nn.Sequential:
    spectrum = decompose(form, grouped(layer))
    return build_factors(layer, form, ranks or spectrum.full, spectrum.factors(ranks or spectrum.full))


@pytest.mark.parametrize("dtype", list(EXACT), ids=str)
@pytest.mark.parametrize("form", ["channel", "tucker2", "spatial", "depthwise", "pointwise"])
@pytest.mark.parametrize("name", list(CONVOLUTIONS))
def test_convolution_at_full_rank_computes_the_same(name, form, dtype) -> None:
    make, arguments, options = CONVOLUTIONS[name]
    layer = make(*arguments, **options).to(dtype)
    if form == "spatial" and (not isinstance(layer, nn.Conv2d) or 1 in layer.kernel_size):
        pytest.skip("the spatial form splits kernels of two dimensions, each wider than 1")
    if form in {"depthwise", "pointwise"} and layer.groups > 1:
        pytest.skip("a depthwise layer replaces a convolution of one group")
    x, factors = images(layer, dtype), factored(layer, form)
    torch.testing.assert_close(factors(x), layer(x), rtol=EXACT[dtype], atol=EXACT[dtype])
    assert {type(part) for part in factors} == {make}
    assert factors[-1].bias is layer.bias
    assert type(factors) is Factors


@pytest.mark.parametrize("name", ["depthwise", "pointwise"])
def test_depthwise_factors_are_the_best_of_each_channel_and_read_as_the_layer(name: str) -> None:
    layer = nn.Conv2d(5, 7, 3, stride=2, padding=1, padding_mode="reflect").double()
    spectrum = decompose(name, grouped(layer))
    factors = build_factors(layer, name, (2,), spectrum.factors((2,)))
    channels = layer.weight.detach().transpose(0, 1) if name == "depthwise" else layer.weight.detach()
    tails = sum(torch.linalg.svdvals(matrix.flatten(1))[2:].square().sum() for matrix in channels)  # Eckart and Young
    error = (factors.weight - layer.weight).detach().square().sum()
    torch.testing.assert_close(error, tails, rtol=1e-9, atol=0.0)
    assert spectrum.error((2,)) == pytest.approx(float(tails / layer.weight.detach().square().sum()), rel=1e-9)
    assert [part.groups for part in factors] == ([5, 1] if name == "depthwise" else [1, 7])
    for attribute in ("in_channels", "out_channels", "groups", "kernel_size", "stride", "padding", "padding_mode"):
        assert getattr(factors, attribute) == getattr(layer, attribute)
    assert current_ranks(factors) == (2,)
    tucker = build_factors(layer, "tucker2", (2, 3))
    assert (tucker.kernel_size, tucker.padding, tucker.padding_mode) == ((3, 3), (1, 1), "reflect")


@pytest.mark.parametrize("dtype", list(EXACT), ids=str)
def test_linear_and_embedding_at_full_rank_compute_the_same(dtype) -> None:
    linear, words = nn.Linear(9, 7).to(dtype), nn.Embedding(11, 6, padding_idx=2).to(dtype)
    x, ids = torch.randn(2, 5, 9, dtype=dtype), torch.randint(11, (3, 4))
    for layer, form, call in ((linear, "linear", x), (words, "embedding", ids)):
        torch.testing.assert_close(factored(layer, form)(call), layer(call), rtol=EXACT[dtype], atol=EXACT[dtype])


WIDTHS, KERNELS = st.integers(2, 7), st.integers(1, 4)
SHAPES = st.tuples(st.sampled_from([1, 2, 3]), WIDTHS, WIDTHS, KERNELS, KERNELS)


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 10**6), st.floats(0.01, 1.0))
def test_error_of_a_rank_is_the_optimum_of_eckart_and_young(shape, seed, share) -> None:
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    groups, out, inputs, height, width = shape
    matrices = {"channel": weight.reshape(groups, out, -1)}
    if height > 1 and width > 1:
        matrices["spatial"] = weight.permute(0, 2, 3, 1, 4).reshape(groups, inputs * height, out * width)
    for form, matrix in matrices.items():
        spectrum = decompose(form, weight)
        rank = max(1, round(share * spectrum.full[0]))
        values = torch.linalg.svdvals(matrix)
        best = values[:, rank:].square().sum()
        found = (compose(form, spectrum.factors((rank,)), groups) - weight).square().sum()
        torch.testing.assert_close(found, best, rtol=1e-8, atol=1e-10)
        assert math.isclose(spectrum.error((rank,)), float(best / weight.square().sum()), rel_tol=1e-6, abs_tol=1e-10)


@settings(max_examples=15, deadline=None)
@given(SHAPES, st.integers(0, 10**6), st.integers(1, 8))
def test_single_precision_error_is_bounded_by_rounding(shape, seed, decay) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * (0.1**decay) ** torch.arange(shape[2]).view(1, 1, -1, 1, 1)
    matrix, spectrum = weight.flatten(2), decompose("channel", weight)
    for rank in range(1, spectrum.full[0] + 1):
        best = torch.linalg.svdvals(matrix.double())[:, rank:].square().sum()
        found = (compose("channel", spectrum.factors((rank,)), shape[0]) - weight).double().square().sum()
        assert best * (1 - 1e-4) - 1e-9 <= found <= best + 1e-6 * matrix.double().square().sum()


GEOMETRIES = st.tuples(
    *[st.integers(1, 4)] * 2, *[st.integers(1, 3)] * 2, *[st.integers(1, 2)] * 2, *[st.integers(0, 2)] * 2
)


@settings(max_examples=30, deadline=None)
@given(
    GEOMETRIES,
    WIDTHS,
    WIDTHS,
    st.sampled_from([1, 2, 3]),
    st.sampled_from(list(EXACT)),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_every_geometry_at_full_rank_computes_the_same(geometry, before, after, groups, dtype, bias, seed) -> None:
    torch.manual_seed(seed)
    pairs = [geometry[place : place + 2] for place in range(0, 8, 2)]
    kernel, stride, dilation, padding = pairs
    layer = nn.Conv2d(before * groups, after * groups, kernel, stride, padding, dilation, groups, bias).to(dtype)
    x = torch.randn(2, before * groups, 9, 8, dtype=dtype)
    for form in ("channel", "tucker2", *(["spatial"] if min(kernel) > 1 else [])):
        torch.testing.assert_close(factored(layer, form)(x), layer(x), rtol=EXACT[dtype], atol=EXACT[dtype])


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.integers(0, 10**6), st.floats(0.1, 1.0), st.floats(0.1, 1.0))
def test_tucker_error_is_exact_and_alternation_only_lowers_it(shape, seed, first, second) -> None:
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    groups, out, inputs, *kernel = shape
    spectrum = decompose("tucker2", weight)
    ranks = max(1, round(first * spectrum.full[0])), max(1, round(second * spectrum.full[1]))
    assume(ranks[0] <= ranks[1] * math.prod(kernel) and ranks[1] <= ranks[0] * math.prod(kernel))  # others gain nothing
    flat = weight.flatten(3)  # the truncated higher-order SVD, written plainly, group by group
    projected = torch.zeros_like(flat)
    for group in range(groups):
        u_out = torch.linalg.svd(flat[group].reshape(out, -1))[0][:, : ranks[1]]
        u_in = torch.linalg.svd(flat[group].transpose(0, 1).reshape(inputs, -1))[0][:, : ranks[0]]
        projected[group] = torch.einsum("pq,rs,qsk->prk", u_out @ u_out.T, u_in @ u_in.T, flat[group])
    plain = (projected - flat).square().sum() / flat.square().sum()
    assert math.isclose(spectrum.error(ranks), float(plain), rel_tol=1e-6, abs_tol=1e-9)
    found = (compose("tucker2", spectrum.factors(ranks), groups) - weight).square().sum() / weight.square().sum()
    assert float(found) <= float(plain) + 1e-9
    tails = (torch.linalg.svdvals(part.reshape(out, -1))[ranks[1] :].square().sum() for part in flat)
    lower = float(sum(tails)) / float(flat.square().sum())  # no projection keeps more than an unfolding's own best
    assert float(found) >= lower - 1e-9


@pytest.mark.parametrize("samples", [200, 5])
def test_whitening_minimizes_the_output_error_on_the_data(samples) -> None:
    weight, x = torch.randn(9, 12, dtype=torch.float64), torch.randn(samples, 12, dtype=torch.float64)
    x = x @ torch.randn(12, 12, dtype=torch.float64)
    covariance = (x.T @ x / samples)[None]
    metric = WhitenedSVD(damping=0.0).metric({"input_covariance": covariance})
    spectrum = decompose("linear", weight[None], metric)
    outputs = weight @ x.T
    values = torch.linalg.svdvals(outputs)
    for rank in (1, 3, 5, 8):
        fitted = compose("linear", spectrum.factors((rank,)), 1)[0]
        found = (fitted @ x.T - outputs).square().sum()
        torch.testing.assert_close(found, values[rank:].square().sum(), rtol=1e-6, atol=1e-8)  # nothing is better
        plain = compose("linear", decompose("linear", weight[None]).factors((rank,)), 1)[0]
        assert found <= (plain @ x.T - outputs).square().sum() + 1e-9
    assert math.isclose(spectrum.error((3,)), float(values[3:].square().sum() / values.square().sum()), rel_tol=1e-5)


def test_diagonal_fits_match_the_formulas_of_their_papers() -> None:
    weight, absolute = torch.randn(6, 8, dtype=torch.float64), torch.rand(1, 8, dtype=torch.float64) + 0.1
    squares = torch.rand(1, 1, 8, dtype=torch.float64) + 0.1
    for fit, evidence, scale in (
        (ActivationSVD(0.5), {"input_absolute": absolute}, absolute[0] ** 0.5),
        (FisherSVD(), {"grad_squared": squares}, squares[0, 0].sqrt()),
    ):
        left, values, right = torch.linalg.svd(weight * scale, full_matrices=False)
        paper = (left[:, :3] * values[:3]) @ right[:3] / scale
        found = compose("linear", decompose("linear", weight[None], fit.metric(evidence)).factors((3,)), 1)[0]
        torch.testing.assert_close(found, paper, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", list(CONVOLUTIONS))
def test_input_covariance_of_a_convolution_is_that_of_its_patches(name) -> None:
    make, arguments, options = CONVOLUTIONS[name]
    layer = make(*arguments, **options).double()
    model, x = nn.Sequential(layer), images(layer, torch.float64)
    collector = EvidenceCollector(model, ["0"], WhitenedSVD.needs, {})
    collector.begin_batch()
    y = model(x)
    collector.end_batch()
    collector.remove()
    covariance = collector.means().get("input_covariance", "0")
    weight = grouped(layer).flatten(2)
    bias = 0 if layer.bias is None else layer.bias.detach().view(1, -1, *(1,) * (y.dim() - 2))
    energy = (y.detach() - bias).square().movedim(1, 0).reshape(layer.groups, -1).sum(1)
    positions = y.numel() // layer.out_channels
    found = torch.einsum("goi,gij,goj->g", weight, covariance, weight) * positions
    torch.testing.assert_close(found, energy, rtol=1e-9, atol=1e-9)


def test_building_factors_draws_no_random_number_and_gradients_flow() -> None:
    layer = nn.Conv2d(6, 8, 3)
    state = torch.get_rng_state()
    factors = factored(layer, "spatial", (3,))
    assert torch.equal(state, torch.get_rng_state())
    F.relu(factors(torch.randn(1, 6, 8, 8))).sum().backward()
    assert all(parameter.grad is not None for parameter in factors.parameters())


def test_factors_of_a_frozen_layer_are_frozen() -> None:
    layer = nn.Linear(8, 8).requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in factored(layer, "linear", (2,)).parameters())


def test_a_subclass_of_a_layer_that_computes_as_the_layer_does_is_factorized() -> None:
    class Named(nn.Linear):
        """A layer with a method of its own, as torchvision's three-dimensional convolutions have."""

        def stride(self) -> int:
            return 1

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    net = nn.Sequential(Named(32, 32), Doubled(32, 32))
    plan = factorize(net, torch.randn(2, 32), RankRatio(0.25))
    assert list(plan.layers) == ["0"]
    assert plan.skipped["1"] == "a Doubled, which has a `forward` of its own"
