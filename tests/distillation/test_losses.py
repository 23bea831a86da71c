"""Every loss against its paper's formula, written again plainly in double precision; and its gradient."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from torch import Tensor

from lightning_light.distillation import (
    DIST,
    DKD,
    RKD,
    SRD,
    AttentionTransfer,
    ChannelWise,
    ContrastiveHint,
    Decreasing,
    FeatureHint,
    KnowledgeReview,
    LogitStandardization,
    OutputRegression,
    SimilarityPreserving,
    SoftTargets,
)
from lightning_light.schedules import Linear

N, C, H, W = 5, 4, 3, 2


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS = torch.tensor([0, 3, 1, 2, 3])


def softmax(logits: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in logits)
    return [math.exp(value) / total for value in logits]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def pearson(a: list[float], b: list[float]) -> float:
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    return covariance / math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))


def soft_targets(s: Tensor, t: Tensor, temperature: float) -> float:
    rows = zip((t / temperature).tolist(), (s / temperature).tolist(), strict=True)
    return temperature**2 * sum(kl(softmax(a), softmax(b)) for a, b in rows) / len(s)


def standardized(s: Tensor, t: Tensor) -> float:
    def normal(row: list[float]) -> list[float]:
        mean = sum(row) / len(row)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in row) / len(row))
        return [(x - mean) / (deviation + 1e-7) for x in row]

    rows = [torch.tensor([normal(row) for row in logits.tolist()], dtype=torch.float64) for logits in (s, t)]
    return soft_targets(rows[0], rows[1], 2.0)


def decoupled(s: Tensor, t: Tensor, alpha: float, beta: float, temperature: float) -> float:
    total = 0.0
    for a, b, label in zip((s / temperature).tolist(), (t / temperature).tolist(), LABELS.tolist(), strict=True):
        p, q = softmax(a), softmax(b)
        target = kl([q[label], 1 - q[label]], [p[label], 1 - p[label]])
        others = [[v / (1 - d[label]) for i, v in enumerate(d) if i != label] for d in (q, p)]
        total += alpha * target + beta * kl(*others)
    return temperature**2 * total / len(s)


def stronger(s: Tensor, t: Tensor, beta: float, gamma: float, temperature: float) -> float:
    p, q = ([softmax(row) for row in (x / temperature).tolist()] for x in (s, t))
    inter = 1 - sum(pearson(a, b) for a, b in zip(p, q, strict=True)) / N
    columns = zip(zip(*p, strict=True), zip(*q, strict=True), strict=True)
    intra = 1 - sum(pearson(list(a), list(b)) for a, b in columns) / C
    return temperature**2 * (beta * inter + gamma * intra)


def attention(s: Tensor, t: Tensor) -> float:
    maps = []
    for features in (s, t):
        q = torch.stack([sum(channel.abs() ** 2 for channel in sample) for sample in features]).flatten(1)
        maps.append(torch.stack([row / row.square().sum().sqrt() for row in q]))
    return float(((maps[0] - maps[1]) ** 2).sum() / maps[0].numel())


def similarity(s: Tensor, t: Tensor) -> float:
    grams = []
    for features in (s, t):
        flat = [sample.flatten() for sample in features]
        gram = torch.stack([torch.stack([a @ b for b in flat]) for a in flat])
        grams.append(torch.stack([row / row.square().sum().sqrt() for row in gram]))
    return float(((grams[0] - grams[1]) ** 2).sum() / len(s) ** 2)


def huber(x: float) -> float:
    return x * x / 2 if abs(x) <= 1 else abs(x) - 0.5


def relations(s: Tensor, t: Tensor, distance: float, angle: float) -> float:
    def distances(x: Tensor) -> list[float]:
        found = [float((a - b).square().sum().sqrt()) for a in x for b in x]
        mean = sum(found) / (len(x) * (len(x) - 1))
        return [value / mean for value in found]

    def angles(x: Tensor) -> list[float]:
        found = []
        for j, i, k in itertools.product(range(len(x)), repeat=3):
            a, b = x[i] - x[j], x[k] - x[j]
            size = float(a.square().sum().sqrt() * b.square().sum().sqrt())
            found.append(float(a @ b) / size if size else 0.0)
        return found

    s, t = s.flatten(1), t.flatten(1)
    pairs = zip(distances(s), distances(t), strict=True)
    triplets = zip(angles(s), angles(t), strict=True)
    n = len(s)
    return distance * sum(huber(a - b) for a, b in pairs) / n**2 + angle * sum(huber(a - b) for a, b in triplets) / n**3


def normalized_distance(s: Tensor, t: Tensor, exponent: float) -> float:
    total = 0.0
    for channel in range(s.shape[1]):
        columns = []
        for x in (s[:, channel], t[:, channel]):
            mean = float(x.mean())
            variance = sum((float(v) - mean) ** 2 for v in x) / len(x)
            columns.append([(float(v) - mean) / math.sqrt(variance + 1e-5) for v in x])
        total += sum(abs(a - b) ** exponent for a, b in zip(*columns, strict=True))
    return math.log(total)


def contrast(s: Tensor, t: Tensor, temperature: float) -> float:
    s, t = (torch.stack([row / row.square().sum().sqrt() for row in x]) for x in (s, t))
    total = 0.0
    for i in range(len(s)):
        total -= math.log(softmax([float(s[i] @ row) / temperature for row in t])[i])
    return total / len(s)


def channels(s: Tensor, t: Tensor, temperature: float) -> float:
    total = 0.0
    for n, c in itertools.product(range(len(s)), range(s.shape[1])):
        p, q = (softmax((x[n, c].flatten() / temperature).tolist()) for x in (s, t))
        total += kl(q, p)
    return temperature**2 / s.shape[1] * total / len(s)


def averaged(x: Tensor, size: int) -> Tensor:
    """To ``size`` x ``size``, by hand: windows from the floor of their beginning to the ceiling of their end."""

    def windows(length: int) -> list[slice]:
        return [slice(i * length // size, -(-(i + 1) * length // size)) for i in range(size)]

    rows, columns = windows(x.shape[2]), windows(x.shape[3])
    return torch.stack([torch.stack([x[:, :, a, b].mean((2, 3)) for b in columns], -1) for a in rows], -2)


def reviewed(s: Tensor, t: Tensor) -> float:
    total = float(((s - t) ** 2).mean())
    for share, size in ((1 / 2, 4), (1 / 4, 2), (1 / 8, 1)):
        total += share * float(((averaged(s, size) - averaged(t, size)) ** 2).mean())
    return total / (1 + 1 / 2 + 1 / 4 + 1 / 8)


LARGE = ((2, C, 6, 5), (2, C, 6, 5))
FLAT, MAPS = ((N, C), (N, C)), ((N, C, H, W), (N, C, H, W))
OTHER_WIDTH = ((N, C, H, W), (N, C + 3, H, W))
CASES: list[tuple[Any, Any, Any]] = [
    (SoftTargets(temperature=3.0), FLAT, lambda s, t: soft_targets(s, t, 3.0)),
    (LogitStandardization(temperature=2.0), FLAT, standardized),
    (DKD(alpha=0.7, beta=3.0, temperature=2.0), FLAT, lambda s, t: decoupled(s, t, 0.7, 3.0, 2.0)),
    (DIST(beta=1.5, gamma=0.5, temperature=2.0), FLAT, lambda s, t: stronger(s, t, 1.5, 0.5, 2.0)),
    (FeatureHint(feature_layers="x"), MAPS, lambda s, t: float(((s - t) ** 2).sum() / s.numel() / 2)),
    (KnowledgeReview(feature_layers="x"), LARGE, reviewed),
    (AttentionTransfer(feature_layers="x"), OTHER_WIDTH, attention),
    (SimilarityPreserving(feature_layers="x"), OTHER_WIDTH, similarity),
    (RKD(distance=2.0, angle=3.0), OTHER_WIDTH, lambda s, t: relations(s, t, 2.0, 3.0)),
    (SRD(feature_layers="x", exponent=4.0), FLAT, lambda s, t: normalized_distance(s, t, 4.0)),
    (ContrastiveHint(feature_layers="x", temperature=0.5), FLAT, lambda s, t: contrast(s, t, 0.5)),
    (ChannelWise(temperature=2.0), MAPS, lambda s, t: channels(s, t, 2.0)),
    (OutputRegression(), FLAT, lambda s, t: float(((s - t) ** 2).sum() / s.numel())),
    (OutputRegression(distance="l1"), FLAT, lambda s, t: float((s - t).abs().sum() / s.numel())),
    (OutputRegression(distance="smooth_l1"), FLAT, lambda s, t: sum(map(huber, (s - t).flatten().tolist())) / (N * C)),
]
IDS = [f"{type(loss).__name__}{place}" for place, (loss, _, _) in enumerate(CASES)]


@pytest.mark.parametrize(("loss", "shapes", "formula"), CASES, ids=IDS)
def test_equals_the_formula_of_the_paper(loss: Any, shapes: Any, formula: Any) -> None:
    s, t = (double(*shape, seed=seed) for seed, shape in enumerate(shapes))
    assert loss(s, t, labels=LABELS).item() == pytest.approx(formula(s, t), rel=1e-9)


@pytest.mark.parametrize(("loss", "shapes", "formula"), CASES, ids=IDS)
def test_gradient_equals_finite_differences(loss: Any, shapes: Any, formula: Any) -> None:
    s, t = (double(*shape, seed=seed) for seed, shape in enumerate(shapes))
    assert torch.autograd.gradcheck(lambda x: loss(x, t, labels=LABELS), s.requires_grad_(), eps=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("loss", "shapes"),
    [(loss, shapes) for loss, shapes, _ in CASES if not isinstance(loss, SRD | ContrastiveHint)],  # least value not 0
)
def test_equal_inputs_have_no_loss_and_no_gradient(loss: Any, shapes: Any) -> None:
    s = double(*shapes[0]).requires_grad_()
    value = loss(s, s.detach().clone(), labels=LABELS)
    (gradient,) = torch.autograd.grad(value, s)
    assert value.item() == pytest.approx(0.0, abs=1e-12)
    assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize(("loss", "shapes", "formula"), CASES, ids=IDS)
def test_half_precision_is_computed_in_single_precision(loss: Any, shapes: Any, formula: Any) -> None:
    s, t = (double(*shape, seed=seed).bfloat16() for seed, shape in enumerate(shapes))
    value = loss(s, t, labels=LABELS)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(formula(s.double(), t.double()), rel=1e-3)


LOGITS = [SoftTargets(), LogitStandardization(), DKD(), DIST()]


@pytest.mark.parametrize("loss", LOGITS, ids=lambda loss: loss.name)
def test_masked_tokens_are_left_out(loss: Any) -> None:
    s, t, labels = double(2, 3, C), double(2, 3, C, seed=1), LABELS.new_tensor([[0, 1, -100], [2, -100, 3]])
    mask = labels != -100
    value = loss(s, t, labels=labels, mask=mask)
    assert torch.equal(value, loss(s[mask], t[mask], labels=labels[mask]))
    assert not torch.equal(value, loss(s, t, labels=labels.clamp_min(0)))


@pytest.mark.parametrize("kind", [SoftTargets, LogitStandardization, DKD, DIST])
def test_pixels_are_positions(kind: Any) -> None:
    s, t, labels = double(2, C, 3, 2), double(2, C, 3, 2, seed=1), torch.arange(12).reshape(2, 3, 2) % C
    dense = kind(class_dim=1)(s, t, labels=labels)
    flat = kind()(*(x.permute(0, 2, 3, 1).reshape(-1, C) for x in (s, t)), labels=labels.flatten())
    assert dense.item() == pytest.approx(flat.item(), rel=1e-12)


def test_output_regression_uses_the_mask() -> None:
    s, t, mask = double(2, 3, C), double(2, 3, C, seed=1), torch.tensor([[True, False, True], [False, False, True]])
    assert torch.equal(OutputRegression()(s, t, mask=mask), ((s - t)[mask] ** 2).sum() / (3 * C))


@pytest.mark.parametrize("loss", [*LOGITS[:3], OutputRegression()], ids=lambda loss: loss.name)
def test_a_fully_masked_batch_has_no_loss(loss: Any) -> None:
    s = double(2, 3, C).requires_grad_()
    none = torch.zeros(2, 3, dtype=torch.bool)
    assert loss(s, double(2, 3, C, seed=1), labels=torch.zeros(2, 3, dtype=torch.long), mask=none).item() == 0.0


def test_feature_hints_at_tokens_use_the_mask() -> None:
    s, t, mask = double(2, 3, C), double(2, 3, C, seed=1), torch.tensor([[True, False, True], [False, False, True]])
    found = FeatureHint(feature_layers="x")(s, t, mask=mask).item()
    assert found == pytest.approx(float(((s - t)[mask] ** 2).sum()) / (3 * C) / 2, rel=1e-12)
    maps, pixels = double(2, C, 3, 3), torch.zeros(2, 3, dtype=torch.bool)
    assert FeatureHint(feature_layers="x")(maps, maps + 1, mask=pixels).item() == pytest.approx(0.5)


def test_knowledge_review_pairs_each_stage_with_those_before_it() -> None:
    found = [("a", "x"), ("b", "y"), ("c", "z")]
    assert FeatureHint(feature_layers="?").pairs(found) == found
    assert KnowledgeReview(feature_layers="?").pairs(found) == [
        ("a", "x"),
        ("b", "x"),
        ("b", "y"),
        ("c", "x"),
        ("c", "y"),
        ("c", "z"),
    ]


def test_attention_maps_of_tokens_are_over_positions() -> None:
    s, t = double(2, 6, C), double(2, 6, C + 3, seed=1)
    expected = AttentionTransfer(feature_layers="x")(*(x.movedim(2, 1)[..., None] for x in (s, t)))
    assert AttentionTransfer(feature_layers="x")(s, t).item() == pytest.approx(expected.item(), rel=1e-12)


def test_soft_targets_equal_torch_kl_div_bit_for_bit() -> None:
    s, t = double(8, 10).float(), double(8, 10, seed=1).float()
    plain = F.kl_div(F.log_softmax(s / 4, 1), F.softmax(t / 4, 1), reduction="batchmean") * 4 * 4
    assert torch.equal(SoftTargets(temperature=4.0)(s, t), plain)


def test_feature_maps_are_compared_at_the_coarser_resolution() -> None:
    fine, coarse = double(2, C, 4, 6), double(2, C, 2, 3, seed=1)
    expected = FeatureHint(feature_layers="x")(F.avg_pool2d(fine, 2), coarse)
    assert FeatureHint(feature_layers="x")(fine, coarse).item() == pytest.approx(expected.item(), rel=1e-12)


@given(st.floats(0.0, 1.0))
def test_decreasing_reverses_a_schedule(progress: float) -> None:
    assert Decreasing(Linear())(progress) == 1.0 - progress


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: SoftTargets(temperature=0.0), r"`SoftTargets\(temperature=0.0\)`: expected a number > 0"),
        (lambda: DKD(weight=-1.0), r"`DKD\(weight=-1.0\)`: expected a number >= 0"),
        (lambda: FeatureHint(projector="mlp"), r"`FeatureHint\(projector='mlp'\)`: expected one of 'auto', 'conv'"),
        (lambda: OutputRegression(distance="l3"), r"`OutputRegression\(distance='l3'\)`: expected one of 'mse'"),
        (lambda: ChannelWise(temperature=-1.0), r"expected a number > 0"),
    ],
)
def test_a_value_out_of_range_is_refused_at_construction(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def test_a_loss_is_hashable() -> None:
    assert [SoftTargets().name, DKD().name, LogitStandardization().name, RKD().name] == [
        "soft_targets",
        "dkd",
        "logit_standardization",
        "rkd",
    ]
    assert SoftTargets() == SoftTargets()
