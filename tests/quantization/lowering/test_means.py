"""Means of whole numbers, also where a runtime takes them in float."""

import pytest
import torch
import torch.nn.functional as F

from lightning_light.quantization.lowering.means import averaged, exact_mean, mean_of_whole_numbers

STEP = float(torch.tensor(0.03714159))


@pytest.mark.parametrize("count", [2, 4, 36, 64, 196, 576, 784])
def test_a_mean_in_float_is_put_where_that_of_whole_numbers_is(count) -> None:
    """round(sum(q) / n) * s, half to even, although the sum of q * s in float32 is a little off."""
    torch.manual_seed(0)
    whole = torch.randint(-100, 156, (20_000, count))
    whole[::2, 0] += (count // 2 - whole[::2].sum(1)) % count  # every second mean ends in a half
    right = torch.round(whole.double().mean(1))
    loose = (whole.float() * STEP).mean(1)
    assert int((torch.round(loose * (1.0 / STEP)) != right).sum()) > 100
    assert torch.equal(torch.round(exact_mean(loose, count, STEP) * (1.0 / STEP)).double(), right)


def test_means_of_odd_or_of_many_numbers_are_left_alone() -> None:
    mean = torch.randn(10)
    assert exact_mean(mean, 49, STEP) is mean
    assert exact_mean(mean, 2**15, STEP) is mean


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("avg_pool2d", (2,), {}),
        ("avg_pool2d", ([2, 3],), {"padding": (0, 1)}),
        ("avg_pool2d", (), {"kernel_size": (4,), "stride": 2}),
        ("adaptive_avg_pool2d", (1,), {}),
        ("adaptive_avg_pool2d", ((2, 3),), {}),
        ("mean", ([2, 3],), {}),
        ("mean", (), {"dim": (-1, -2), "keepdim": True}),
        ("mean", (-1,), {}),
    ],
)
def test_how_many_numbers_a_mean_is_of(name, args, kwargs) -> None:
    function = torch.mean if name == "mean" else getattr(F, name)
    one = torch.zeros(1, 1, 12, 12)
    one[..., 5, 5] = 1.0
    found = function(one, *args, **kwargs)
    assert averaged(name, [one, *args], kwargs, found) == round(1.0 / float(found.max()))


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("avg_pool2d", (3, 2, 1), {"count_include_pad": False}),
        ("avg_pool2d", (5, 5), {"ceil_mode": True}),
        ("avg_pool2d", (2,), {"divisor_override": 3}),
        ("adaptive_avg_pool2d", (5,), {}),
    ],
)
def test_where_not_every_mean_is_of_as_many(name, args, kwargs) -> None:
    x = torch.zeros(1, 1, 12, 12)
    assert averaged(name, [x, *args], kwargs, getattr(F, name)(x, *args, **kwargs)) == 1


def test_half_a_step_goes_to_even() -> None:
    whole = torch.tensor([[[[0.0, 1.0, 1.0, 2.0, 2.0, 3.0, -1.0, 0.0, -2.0, -1.0]]]])
    found = mean_of_whole_numbers(F.avg_pool2d, [whole * STEP, (1, 2)], {}, STEP)
    assert (found / STEP).round().flatten().tolist() == [0.0, 2.0, 2.0, 0.0, -2.0]
