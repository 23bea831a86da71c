"""Each operator's start: exact where the operator can compute what the layer does, and a fit that only improves it."""

import pytest
import torch
from torch import nn

from lightning_light.errors import ManifestError
from lightning_light.substitution import DepthwiseSeparable, Fire, Ghost, GroupShuffle, InvertedResidual, Operator
from lightning_light.substitution.fitting import fit_operator
from lightning_light.substitution.operators import operator_from, plain_operator
from lightning_light.substitution.starts import assign_balanced, fit_convolution, representatives
from tests.zoo import noise

GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 5), "padding": "same", "bias": False},
    {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2},
    {"kernel_size": 2, "padding": "valid"},
]


def conv(inputs: int, outputs: int, **options) -> nn.Conv2d:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Conv2d(inputs, outputs, **options).requires_grad_(False)


def error(operator: Operator, layer: nn.Conv2d, steps: int = 0) -> float:
    inputs = [noise(8, layer.in_channels, 9, 9), noise(8, layer.in_channels, 9, 9).flip(0) * 2]
    return fit_operator(operator, layer, inputs, [layer(x) for x in inputs], steps)[1]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_all_depthwise_kernels_compute_the_layer(geometry) -> None:
    layer = conv(4, 20, **geometry)
    elements = layer.kernel_size[0] * layer.kernel_size[1]
    assert error(DepthwiseSeparable(elements), layer) < 1e-6
    few = [error(DepthwiseSeparable(multiplier), layer) for multiplier in (1, elements // 2)]
    assert 1e-3 < few[1] < few[0] < 1.0
    assert "at most" in (DepthwiseSeparable(elements + 1).incompatibility(layer) or "")


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_hidden_groups_are_found(geometry) -> None:
    grouped = conv(8, 12, groups=2, **geometry)
    layer = conv(8, 12, **geometry)
    shuffled_in, shuffled_out = torch.tensor([5, 0, 3, 6, 2, 7, 1, 4]), torch.randperm(12, generator=torch.Generator())
    layer.weight.zero_()
    for output in range(12):
        group = slice(0, 4) if output < 6 else slice(4, 8)
        layer.weight[shuffled_out[output], shuffled_in[group]] = grouped.weight[output]
    assert error(GroupShuffle(2), layer) < 1e-6
    assert "3 groups do not divide" in (GroupShuffle(3).incompatibility(layer) or "")


def test_channels_that_others_predict_become_ghosts() -> None:
    layer = conv(5, 9, kernel_size=3, padding=1)
    kept, made = torch.tensor([1, 2, 4, 6, 8]), torch.tensor([0, 3, 5, 7])
    layer.weight[made] = -0.5 * layer.weight[kept[:4]]
    layer.bias[made] = 3.0
    assert error(Ghost(2), layer) < 2e-3
    assert error(Ghost(2, kernel_size=1), layer) < 2e-3
    assert error(Ghost(3), layer) > 0.1


@pytest.mark.parametrize("options", [{}, {"stride": 2, "bias": False}])
def test_a_layer_of_low_rank_with_pointwise_outputs_becomes_fire(options) -> None:
    layer = conv(8, 6, kernel_size=3, padding=1, **options)
    basis = noise(2, 8)
    layer.weight.copy_(torch.einsum("oqhw,qi->oihw", noise(6, 2, 3, 3), basis))
    for output in (1, 2, 5):
        middle = layer.weight[output, :, 1, 1].clone()
        layer.weight[output] = 0.0
        layer.weight[output, :, 1, 1] = middle
    assert error(Fire(0.25), layer) < 1e-4
    assert error(Fire(0.125), layer) > 0.05
    assert Fire().incompatibility(conv(8, 6, kernel_size=3))


def test_a_fit_improves_the_start() -> None:
    layer = conv(6, 6, kernel_size=3, padding=1)
    for operator in (InvertedResidual(1.0), DepthwiseSeparable(), Ghost(2)):
        start = error(operator, layer)
        assert error(operator, layer, steps=60) < 0.99 * start < 1.0


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("groups", [1, 3])
def test_least_squares_recover_a_convolution_from_its_outputs(geometry, groups) -> None:
    layer = conv(6, 9, groups=groups, **geometry)
    fitted = conv(6, 9, groups=groups, **geometry)
    fitted.weight.zero_()
    inputs = [noise(24, 6, 11, 11)]
    fit_convolution(fitted, inputs, [layer(x) for x in inputs])
    assert torch.allclose(fitted.weight, layer.weight, atol=2e-3)


def test_assignments_keep_the_capacity_and_representatives_predict() -> None:
    scores = noise(12, 3)
    assert assign_balanced(scores, 4).bincount().tolist() == [4, 4, 4]
    base = noise(3, 50)
    rows = torch.cat([base, base[:2] * 2, base[2:] + 0.01 * noise(1, 50)])
    assert {place % 3 for place in representatives(torch.corrcoef(rows), 3).tolist()} == {0, 1, 2}


def test_an_operator_is_read_from_a_checkpoint_only_if_its_class_is_imported() -> None:
    for operator in (DepthwiseSeparable(2), GroupShuffle(4), Ghost(3, 5), Fire(0.25), InvertedResidual(1.5)):
        assert operator_from(plain_operator(operator)) == operator
    with pytest.raises(ManifestError, match=r"operator `mine\.Small`.*Import the module"):
        operator_from(["mine.Small", {}])
