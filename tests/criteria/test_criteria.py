"""Every criterion against its formula, written out plainly here."""

import inspect

import pytest
import torch
from torch import Tensor

import lightning_light.criteria as criteria
from lightning_light.criteria import (
    SNIP,
    Activation,
    BatchNormScale,
    Criterion,
    Evidence,
    GeometricMedian,
    GroupCriterion,
    Hessian,
    Magnitude,
    Movement,
    Random,
    SoftMovement,
    Taylor,
    Wanda,
    channel_scores,
)

ALL: list[Criterion] = [
    Activation(),
    BatchNormScale(),
    GeometricMedian(),
    Hessian(),
    Magnitude(),
    Magnitude(p=1.0),
    Movement(),
    Random(seed=3),
    SNIP(),
    SoftMovement(),
    Taylor(),
    Wanda(),
]
SHAPES = [(6, 4, 3, 3), (6, 4), (6,), (1, 4), (1,)]


def evidence(shape: tuple[int, ...] = (6, 4, 3, 3), dtype: torch.dtype = torch.float32) -> Evidence:
    source = torch.Generator().manual_seed(1)
    weight, grad = torch.randn(shape, generator=source), torch.randn(shape, generator=source)
    squared, activation = torch.rand(shape, generator=source), torch.rand(shape[0], generator=source)
    inputs, movement = torch.rand(shape, generator=source), torch.rand(shape, generator=source)
    pieces = (piece.to(dtype) for piece in (weight, grad, squared, activation, inputs, movement))
    weight, grad, squared, activation, inputs, movement = pieces
    return Evidence(weight, "out", grad, squared, activation, torch.Generator().manual_seed(2), inputs, movement)


def test_every_criterion_is_tried_here() -> None:
    public = {value for value in vars(criteria).values() if inspect.isclass(value) and issubclass(value, Criterion)}
    of_groups = {value for value in public if issubclass(value, GroupCriterion)}
    assert {type(criterion) for criterion in ALL} == public - of_groups - {Criterion}


@pytest.mark.parametrize("criterion", ALL, ids=repr)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_one_finite_score_a_weight(criterion: Criterion, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    scores = criterion(evidence(shape, dtype))
    assert scores.shape == shape
    assert scores.isfinite().all()
    assert (scores >= 0).all()
    assert scores.dtype in (torch.float32, torch.float64)


@pytest.mark.parametrize("criterion", ALL, ids=repr)
def test_a_criterion_reads_what_it_needs_and_nothing_else(criterion: Criterion) -> None:
    full = evidence()
    needed = {name: getattr(full, name) for name in criterion.needs}
    assert torch.equal(criterion(Evidence(full.weight, **needed)), criterion(evidence()))


@pytest.mark.parametrize("criterion", [Activation(), Hessian(), Taylor()], ids=repr)
def test_missing_evidence_is_not_passed_over(criterion: Criterion) -> None:
    with pytest.raises(ValueError, match="the criterion's `needs` names"):
        criterion(Evidence(torch.ones(3, 2)))


@pytest.mark.parametrize("criterion", ALL, ids=repr)
def test_a_criterion_is_a_value_and_keeps_nothing(criterion: Criterion) -> None:
    before = torch.get_rng_state()
    state = dict(vars(criterion))
    given = evidence()
    weight = given.weight.clone()
    criterion(given)
    assert vars(criterion) == state
    assert torch.equal(given.weight, weight)
    assert torch.equal(torch.get_rng_state(), before)
    assert eval(repr(criterion)) == criterion
    assert hash(criterion) == hash(eval(repr(criterion)))


@pytest.mark.parametrize("criterion", ALL, ids=repr)
def test_scores_carry_no_graph(criterion: Criterion) -> None:
    full = evidence()
    weight = torch.nn.Parameter(full.weight)
    pieces = {name: getattr(full, name) for name in criterion.needs}
    assert not criterion(Evidence(weight, **pieces)).requires_grad


def test_magnitude() -> None:
    weight = evidence().weight
    assert torch.equal(Magnitude(p=1.0)(Evidence(weight)), weight.abs())
    assert torch.allclose(Magnitude(p=2.0)(Evidence(weight)), weight * weight)
    assert torch.allclose(channel_scores(Magnitude()(Evidence(weight))), weight.flatten(1).norm(dim=1) ** 2)


def test_small_half_precision_weights_do_not_score_zero() -> None:
    tiny = torch.tensor([[1e-5], [2e-5]], dtype=torch.float16)
    low, high = Magnitude(p=2.0)(Evidence(tiny)).flatten().tolist()
    assert 0.0 < low < high


def test_network_slimming() -> None:
    gamma = torch.tensor([-0.5, 0.1, 0.0])
    assert torch.equal(BatchNormScale()(Evidence(gamma, "norm")), torch.tensor([0.5, 0.1, 0.0]))
    assert BatchNormScale.roles == {"norm"}


def test_taylor_of_molchanov_2019() -> None:
    """The score of filter s is sum over its weights of (g * w)**2."""
    given = evidence()
    assert given.grad is not None
    expected = [
        sum((w * g) ** 2 for w, g in zip(weights.flatten().tolist(), grads.flatten().tolist(), strict=True))
        for weights, grads in zip(given.weight, given.grad, strict=True)
    ]
    assert channel_scores(Taylor()(given)).tolist() == pytest.approx(expected, rel=1e-5)


def test_taylor_is_the_squared_change_of_a_linear_loss() -> None:
    weight, slope = torch.randn(5, generator=torch.Generator().manual_seed(0)), torch.arange(1.0, 6.0)
    removed = [weight.clone().index_fill(0, torch.tensor(index), 0.0) for index in range(5)]
    change = torch.stack([(slope * weight).sum() - (slope * without).sum() for without in removed])
    assert torch.allclose(Taylor()(Evidence(weight, grad=slope)), change**2, rtol=1e-4)


def test_optimal_brain_damage() -> None:
    """Is h * w**2 / 2: exactly the change of a quadratic loss around its minimum."""
    weight, curvature = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([3.0, 0.1, 8.0])

    def loss(at: Tensor) -> Tensor:
        return (curvature * (at - weight) ** 2).sum() / 2

    removed = [weight.clone().index_fill(0, torch.tensor(index), 0.0) for index in range(3)]
    change = torch.stack([loss(without) - loss(weight) for without in removed])
    assert torch.allclose(Hessian()(Evidence(weight, grad_squared=curvature)), change)


def test_geometric_median_of_he_2019() -> None:
    weight = evidence((30, 4, 3, 3)).weight  # above 25 rows cdist would take its inexact form
    expected = [sum((one - other).pow(2).sum().sqrt().item() for other in weight) for one in weight]
    scores = GeometricMedian()(Evidence(weight))
    assert channel_scores(scores).tolist() == pytest.approx(expected, rel=1e-4)
    assert torch.equal(scores, scores[:, :1, :1, :1].expand_as(scores))


def test_equal_filters_are_at_no_distance() -> None:
    weight = torch.full((40, 8), 3.1415)
    assert GeometricMedian()(Evidence(weight)).count_nonzero() == 0


def test_activation() -> None:
    means = torch.tensor([0.5, 2.0])
    scores = Activation()(Evidence(torch.randn(2, 3, 3), activation=means))
    assert torch.allclose(channel_scores(scores), means)


def test_random_is_decided_by_seed_and_generator() -> None:
    def draw(seed: int, generator_seed: int | None = None) -> Tensor:
        generator = None if generator_seed is None else torch.Generator().manual_seed(generator_seed)
        return Random(seed)(Evidence(torch.zeros(50), generator=generator))

    assert torch.equal(draw(0), draw(0))
    assert torch.equal(draw(0, 5), draw(0, 5))
    distinct = [draw(0), draw(1), draw(0, 5), draw(1, 5), draw(0, 6)]
    assert all(not torch.equal(a, b) for i, a in enumerate(distinct) for b in distinct[:i])


def test_random_differs_between_two_tensors_of_one_shape() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (Random()(Evidence(torch.zeros(9), generator=generator)) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("p", [0.0, -1.0, float("nan")])
def test_magnitude_refuses_an_exponent_that_orders_nothing(p: float) -> None:
    with pytest.raises(ValueError, match=r"`Magnitude\(p=.*\)`: expected a number > 0"):
        Magnitude(p)


@pytest.mark.parametrize(
    "pieces",
    [{"grad": torch.ones(2, 3)}, {"grad_squared": torch.ones(3)}, {"activation": torch.ones(2)}],
)
def test_evidence_of_another_shape_is_refused(pieces: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"`Evidence\(\w+=...\)`: expected shape"):
        Evidence(torch.ones(3, 2), **pieces)
