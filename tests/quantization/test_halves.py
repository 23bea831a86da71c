"""Scales are moved so that no sum or product of whole numbers is near to a half, whoever computes it."""

import pytest
import torch

from lightning_light.quantization.halves import Halves
from lightning_light.quantization.plan import Plan
from lightning_light.quantization.rules import Grid

STEPS = torch.arange(-255, 256, dtype=torch.float64)
SCALES = [(0.03714159, 120), (0.02130718, 100), (0.04892718, 128), (0.00912357, 0), (0.05171732, 3)]


def avoided(sums=(), products=(), means=(), scales=SCALES, fixed=()):
    single = [scale and (float(torch.tensor(scale[0])), scale[1]) for scale in scales]
    plan = Plan(
        sums=[*sums], products=[*products], outputs={str(grid): grid for grid in means}, means=[*map(str, means)]
    )
    grids = [Grid(learned="step" if place in fixed else "") for place in range(len(scales))]
    return single, Halves(plan).avoided(single, grids)


def from_a_half(exact: torch.Tensor) -> float:
    return float((exact - exact.floor() - 0.5).abs().min())


def test_sums_keep_away_from_halves() -> None:
    before, after = avoided(sums=[[0, 1, 2], [2, 3, 4]])
    for a, b, y in ([0, 1, 2], [2, 3, 4]):
        exact = (STEPS[:, None] * after[a][0] + STEPS * after[b][0]) / after[y][0]
        assert from_a_half(exact) > 1.0 / (2.1 * 1001)
        assert from_a_half((STEPS[:, None] * before[a][0] + STEPS * before[b][0]) / before[y][0]) < 1e-4
    for (old, zero), (new, same) in zip(before, after, strict=True):
        assert same == zero
        assert old * (1 - 1e-6) <= new <= 1.03 * old


def test_fixed_point_and_float_add_alike() -> None:
    """QNNPACK: 21 bits, halves away from zero; XNNPACK: 20 bits, halves up; ONNX Runtime, x86: float32, to even."""

    def differ(scales) -> int:
        (a, _), (b, _), (y, _) = scales[:3]
        right = torch.round(((STEPS[:, None] * a).float() + (STEPS * b).float()) / y)
        found = 0
        for bits in (21, 20):
            whole = STEPS[:, None] * round(a / y * 2**bits) + STEPS * round(b / y * 2**bits)
            for other in (torch.floor(whole / 2**bits + 0.5), whole.sign() * torch.floor(whole.abs() / 2**bits + 0.5)):
                found += int((other != right).sum())
        return found

    before, after = avoided(sums=[[0, 1, 2]])
    assert differ(before)
    assert not differ(after)


def test_products_keep_away_from_halves() -> None:
    before, after = avoided(products=[[0, 1, 2]])
    exact = STEPS[:, None] * STEPS * (after[0][0] * after[1][0] / after[2][0])
    assert all(old[0] <= new[0] <= 1.003 * old[0] for old, new in zip(before, after, strict=True))
    assert from_a_half(exact) > 1e-4


def test_a_product_of_what_was_added_follows_the_sum() -> None:
    _, after = avoided(sums=[[0, 1, 2]], products=[[2, 3, 4]])
    assert after[:3] == avoided(sums=[[0, 1, 2]])[1][:3]
    exact = STEPS[:, None] * STEPS * (after[2][0] * after[3][0] / after[4][0])
    assert from_a_half(exact) > 1e-4


@pytest.mark.parametrize("fixed", [0, 1, 2])
def test_what_is_learned_stays_and_so_does_what_it_is_added_to(fixed) -> None:
    before, after = avoided(sums=[[0, 1, 2]], fixed=[fixed])
    assert after[:3] == before[:3]


def test_a_grid_that_cuts_off_at_six_goes_on_to() -> None:
    scale = float(torch.tensor(6.0 / 255)), 0
    ((found, zero),) = Halves(Plan()).avoided([scale], [Grid(positive=True, cap=6.0)])
    assert zero == 0
    assert 5.9999 < 255 * found <= 6.0 * (1 + 1e-7)
    assert float(torch.tensor(found) * 14 * 14) == found * 14 * 14


def test_of_a_product_with_an_average_the_gate_is_moved() -> None:
    _, after = avoided(products=[[0, 1, 2]], means=[0], fixed=[2])
    assert float(torch.tensor(after[0][0]) * 14 * 14) == after[0][0] * 14 * 14
    exact = STEPS[:, None] * STEPS * (after[0][0] * after[1][0] / after[2][0])
    assert from_a_half(exact) > 1e-4


def test_a_factor_is_moved_where_the_result_may_not_be() -> None:
    before, after = avoided(sums=[[0, 1, 2]], products=[[3, 4, 1]], fixed=[0])
    assert after[:3] == before[:3]
    exact = STEPS[:, None] * STEPS * (after[3][0] * after[4][0] / after[1][0])
    assert from_a_half(exact) > 1e-4
    assert all(old[0] <= new[0] <= 1.01 * old[0] for old, new in zip(before[3:], after[3:], strict=True))


def test_all_that_is_added_to_a_product_moves_along() -> None:
    before, after = avoided(sums=[[0, 1, 2]], products=[[3, 4, 2]], fixed=[3, 4])
    assert from_a_half(STEPS[:, None] * STEPS * (after[3][0] * after[4][0] / after[2][0])) > 1e-4
    assert from_a_half((STEPS[:, None] * after[0][0] + STEPS * after[1][0]) / after[2][0]) > 1.0 / (2.1 * 1001)
    assert all(old[0] * (1 - 1e-6) <= new[0] <= 1.03 * old[0] for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("zero", [1, 3, 127, 128, 129, 251, 254])
def test_zero_points_of_means_are_even_and_nothing_is_cut_off(zero) -> None:
    ((before, _),), ((after, even),) = avoided(means=[0], scales=[(0.0371, zero)])
    assert even % 2 == 0
    assert after * even >= before * zero * (1 - 1e-6)
    assert after * (255 - even) >= before * (255 - zero) * (1 - 1e-6)
    assert after <= before * 1.0091


def test_to_divide_and_to_multiply_by_the_inverse_are_alike() -> None:
    torch.manual_seed(0)
    x = torch.randn(1_000_000) * 3

    def differ(scales) -> int:
        found = [(torch.round(x / step), torch.round(x * (1.0 / torch.tensor(step)))) for step, _ in scales]
        return sum(int((one != other).sum()) for one, other in found)

    before, after = avoided(scales=[(0.01 + 0.0003 * place, 0) for place in range(20)])
    assert all(old[0] <= new[0] <= 1.001 * old[0] for old, new in zip(before, after, strict=True))
    assert differ(before) > 20 * max(differ(after), 1)


def test_what_was_never_seen_stays_unknown() -> None:
    scales = [None, *SCALES[1:]]
    _, after = avoided(sums=[[0, 1, 2], [0, 0, 0]], products=[[0, 3, 4]], scales=scales)
    assert after[0] is None
    assert after[3:] == avoided(scales=scales)[1][3:]


def test_a_scale_that_is_too_small_to_count_stays() -> None:
    before, after = avoided(sums=[[0, 1, 2]], scales=[(0.0371, 0), (0.0001, 0), (0.0489, 0)])
    assert after[1] == before[1]


@pytest.mark.parametrize("sums", [[], [[0, 1, 2], [2, 3, 4]]])
def test_a_scale_times_a_count_is_exact(sums) -> None:
    _, after = avoided(sums=sums)
    for count in (3, 5, 7, 9, 25, 49, 14 * 14, 24 * 24, 56 * 56):
        assert all(float(torch.tensor(step) * count) == step * count for step, _ in after)
