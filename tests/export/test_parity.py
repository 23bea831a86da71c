"""The comparison finds differences and names the output."""

import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from lightning_light.errors import ParityError
from lightning_light.export.parity import Parity, Tolerance, compare_outputs

NUMBERS = st.floats(-100.0, 100.0)


def between(
    model: object, file: object, tolerance: Tolerance = Tolerance(), scales: list[float] | None = None
) -> Parity:
    return compare_outputs(lambda _: model, lambda _: file, [(3, None)], tolerance, scales)


@given(st.lists(NUMBERS, min_size=1, max_size=5), NUMBERS, st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_every_element_is_checked(right: list[float], off: float, absolute: float, relative: float) -> None:
    model = torch.tensor(right, dtype=torch.float64)
    file = model.clone()
    file[-1] += off
    difference = abs(float(file[-1] - model[-1]))
    rms = float(model.square().mean().sqrt())
    if difference <= absolute + relative * max(abs(right[-1]), rms):
        assert between(model, file, Tolerance(absolute, relative)).max_absolute == difference
    else:
        with pytest.raises(ParityError, match="1 of "):
            between(model, file, Tolerance(absolute, relative))


def test_worst_over_all_outputs_and_batches() -> None:
    model = {1: (torch.tensor([1.0, 2.0]), [torch.tensor([4.0])]), 2: (torch.tensor([8.0, 0.0]), [torch.tensor([1.0])])}
    file = {1: (torch.tensor([1.0, 2.5]), [torch.tensor([4.0])]), 2: (torch.tensor([8.0, 0.0]), [torch.tensor([1.75])])}
    found = compare_outputs(model.get, file.get, [(2, 1), (3, 2)], Tolerance(absolute=1.0))
    assert found == Parity(max_absolute=0.75, max_relative=0.75, batches=2, samples=5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_have_to_be_equal(value: float) -> None:
    odd, plain = torch.tensor([1.0, value]), torch.tensor([1.0, 2.0])
    assert between(odd, odd).max_absolute == 0.0
    for model, file in ((odd, plain), (plain, odd)):
        with pytest.raises(ParityError, match="1 of 2 elements"):
            between(model, file, Tolerance(absolute=1e9))


@pytest.mark.parametrize(
    ("model", "file"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        ((torch.zeros(2), torch.zeros(2)), torch.zeros(2)),
    ],
)
def test_other_shapes_are_an_error(model: Tensor, file: Tensor) -> None:
    with pytest.raises(ParityError, match="expected outputs of shapes"):
        between(model, file)


def test_classes_have_to_be_equal() -> None:
    with pytest.raises(ParityError, match=r"of output\['label'\] .* the worst is 2 in the file, 1 in the model"):
        between({"label": torch.tensor([0, 1])}, {"label": torch.tensor([0, 2])})


def test_rounding_errors_are_relative_to_the_whole_output() -> None:
    """An element near zero is the difference of large ones."""
    model, file = torch.tensor([3.0, -3.0, 0.0]), torch.tensor([3.0, -3.0, 2e-4])
    assert between(model, file).max_absolute == pytest.approx(2e-4)
    with pytest.raises(ParityError, match="1 of 3 elements"):
        between(model / 30, file - model + model / 30)


def test_large_indices_have_to_be_equal() -> None:
    with pytest.raises(ParityError, match="1 of 2 elements"):
        between(torch.tensor([50_000, 3]), torch.tensor([50_001, 3]))


@pytest.mark.parametrize("scale", [0.1, 0.0])
def test_few_elements_of_an_int8_file_may_differ_by_more(scale: float) -> None:
    model = torch.linspace(0.0, 25.5, 2000)  # a step is 0.1, the output's scale or its range over 255
    file = model.clone()
    file[:2] += 5.0
    assert between(model, file, scales=[scale]).quant_steps["output"] == pytest.approx(50.0, rel=1e-3)
    for options in ({"outliers": 0.0}, {"outliers": 0.0009}):
        with pytest.raises(ParityError, match=r"2 of 2000 elements.*outliers"):
            between(model, file, Tolerance(**options), scales=[scale])
    file[2] += 5.0
    with pytest.raises(ParityError, match="3 of 2000 elements"):
        between(model, file, scales=[scale])
    file[:3] = model[:3]
    file[7] = math.nan
    with pytest.raises(ParityError, match="1 of 2000 elements"):
        between(model, file, scales=[scale])
    with pytest.raises(ParityError, match="1 of 2000 elements"):  # of a float file there are none
        between(model, torch.cat([model[:1] + 5.0, model[1:]]))


def test_order_of_a_dict_does_not_matter() -> None:
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    assert between({"a": one, "b": two}, {"b": two, "a": one}).max_absolute == 0.0
