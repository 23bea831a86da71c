from typing import get_args

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from lightning_light.criteria.reduction import (
    Normalizer,
    Reduction,
    channel_scores,
    combine,
    normalize,
)

SCORES = st.lists(st.floats(0.0, 1e3, width=32), min_size=1, max_size=20).map(torch.tensor)


def test_channel_scores_sum_all_but_the_first_axis() -> None:
    score = torch.arange(24.0).reshape(2, 3, 4)
    assert channel_scores(score).tolist() == [66.0, 210.0]
    assert channel_scores(torch.tensor([3.0, 4.0])).tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [("sum", [4.0, 7.0]), ("mean", [2.0, 3.5]), ("max", [3.0, 5.0]), ("prod", [3.0, 10.0]), ("first", [1.0, 5.0])],
)
def test_combine(reduction: Reduction, expected: list[float]) -> None:
    assert combine([torch.tensor([1.0, 5.0]), torch.tensor([3.0, 2.0])], reduction).tolist() == expected


@pytest.mark.parametrize("reduction", get_args(Reduction))
def test_a_single_member_speaks_for_the_group(reduction: Reduction) -> None:
    assert combine([torch.tensor([1.0, 5.0])], reduction).tolist() == [1.0, 5.0]


@pytest.mark.parametrize("normalizer", get_args(Normalizer))
@given(scores=SCORES)
def test_normalizing_keeps_the_order(normalizer: Normalizer, scores: Tensor) -> None:
    normalized = normalize(scores, normalizer)
    assert normalized.shape == scores.shape
    assert normalized.isfinite().all()
    ascending = normalized[scores.argsort(stable=True)]
    assert (ascending.diff() >= -1e-5 * ascending.abs().max()).all()


def test_normalizers() -> None:
    scores = torch.tensor([1.0, 4.0, 3.0])
    assert torch.equal(normalize(scores, None), scores)
    assert torch.allclose(normalize(scores, "mean").mean(), torch.tensor(1.0))
    assert torch.allclose(normalize(scores, "sum").sum(), torch.tensor(1.0))
    assert torch.allclose(normalize(scores, "max").max(), torch.tensor(1.0))
    assert torch.allclose(normalize(scores, "standardization"), torch.tensor([0.0, 1.0, 2 / 3]))
    assert torch.allclose(normalize(scores, "gaussian"), (scores - scores.mean()) / scores.std())


def test_lamp_of_lee_2021() -> None:
    """score(u) = w[u]**2 / sum of w[v]**2 over all v with |w[v]| >= |w[u]|."""
    weight = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor(
        [[w**2 / sum(v**2 for v in weight.flatten() if abs(v) >= abs(w)) for w in r] for r in weight]
    )
    assert torch.allclose(normalize(weight**2, "lamp"), expected)


@pytest.mark.parametrize("normalizer", get_args(Normalizer))
@pytest.mark.parametrize("scores", [torch.zeros(4), torch.zeros(1), torch.zeros(0)], ids=str)
def test_zeros_stay_zeros(normalizer: Normalizer, scores: Tensor) -> None:
    assert torch.equal(normalize(scores, normalizer), scores)


def test_a_group_without_scores_is_refused() -> None:
    with pytest.raises(ValueError, match="score of at least one tensor"):
        combine([], "mean")
    with pytest.raises(ValueError, match="expected one of"):
        combine([torch.ones(2)], "average")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected one of"):
        normalize(torch.ones(2), "average")  # type: ignore[arg-type]
