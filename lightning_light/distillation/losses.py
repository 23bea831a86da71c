"""All distillation losses, over logits and over features of inner layers: ``ll.losses``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_light.distillation.loss import (
    Decreasing,
    DistillationLoss,
    FeatureLoss,
    kullback_leibler,
    pooled,
    rows,
    same_resolution,
)
from lightning_light.validation import NonNegativeFloat, PositiveFloat, validated

__all__ = [
    "AttentionTransfer",
    "ChannelWise",
    "ContrastiveHint",
    "DIST",
    "DKD",
    "Decreasing",
    "DistillationLoss",
    "FeatureHint",
    "FeatureLoss",
    "KnowledgeReview",
    "LogitStandardization",
    "OutputRegression",
    "RKD",
    "SRD",
    "SimilarityPreserving",
    "SoftTargets",
]


# Losses over logits.


@validated
@dataclass(frozen=True, kw_only=True)
class SoftTargets(DistillationLoss):
    """Match the teacher's softened probabilities: ``T^2 * KL(softmax(t / T) || softmax(s / T))``.

    Hinton et al., 2015, "Distilling the Knowledge in a Neural Network". https://arxiv.org/abs/1503.02531

    Args:
        temperature: T; a higher one gives more weight to the unlikely classes.
        class_dim: which dimension counts classes: -1 for ``(N, C)`` and tokens ``(N, T, C)``, 1 for ``(N, C, H, W)``.
        weight: see `DistillationLoss`.
        schedule: see `DistillationLoss`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> loss = SoftTargets(temperature=2.0)
        >>> loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]])).item() < 1e-6
        True
    """

    temperature: PositiveFloat = 4.0
    class_dim: int = -1

    @override
    def __call__(
        self, student: Tensor, teacher: Tensor, *, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        s, t = (rows(logits, self.class_dim, mask) for logits in (student, teacher))
        if self.needs_labels and labels is not None:
            labels = labels.reshape(-1) if mask is None else labels.reshape(-1)[mask.reshape(-1).bool()]
        return self.compare(s, t, labels)

    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Compute the loss, a scalar.

        Args:
            student: logits ``(positions, classes)``, of the positions that count.
            teacher: logits of the teacher, of the same shape.
            labels: of these positions, for losses that need them.
        """
        return kullback_leibler(student, teacher, self.temperature)


@validated
@dataclass(frozen=True, kw_only=True)
class LogitStandardization(SoftTargets):
    """Match softened probabilities of standardized logits: ``(z - mean(z)) / std(z)`` over the classes of each.

    The student has to match the relations of the teacher's logits, not their range. Sun et al., 2024, "Logit
    Standardization in Knowledge Distillation". https://arxiv.org/abs/2403.01427. The standard deviation divides by the
    number of classes.

    Args:
        temperature: see `SoftTargets`.
        class_dim: see `SoftTargets`.
        weight: see `DistillationLoss`; the authors use 9 for CIFAR.
        schedule: see `DistillationLoss`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
    """

    temperature: PositiveFloat = 2.0

    @override
    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        return kullback_leibler(_standardized(student), _standardized(teacher), self.temperature)


@validated
@dataclass(frozen=True, kw_only=True)
class DKD(SoftTargets):
    """Match target-class and non-target-class probabilities separately.

    ``T^2 * (alpha * KL(target or not) + beta * KL(among the other classes))``. Zhao et al., 2022, "Decoupled Knowledge
    Distillation". https://arxiv.org/abs/2203.08679

    Args:
        alpha: weight of the target-class part.
        beta: weight of the non-target-class part.
        temperature: see `SoftTargets`.
        class_dim: see `SoftTargets`.
        weight: see `DistillationLoss`. The authors let it rise over 20 epochs: ``schedule=Window(Linear(), 0, 20)``.
        schedule: see `DistillationLoss`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
    """

    alpha: NonNegativeFloat = 1.0
    beta: NonNegativeFloat = 8.0

    needs_labels: ClassVar[bool] = True

    @override
    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None  # promised by `needs_labels`
        (target_s, other_s), (target_t, other_t) = (
            _decoupled(logits / self.temperature, labels) for logits in (student, teacher)
        )
        target = F.kl_div(target_s, target_t, reduction="sum", log_target=True)
        other = F.kl_div(other_s, other_t, reduction="sum", log_target=True)
        count = max(len(student), 1)
        return (self.alpha * target + self.beta * other) / count * self.temperature * self.temperature


@validated
@dataclass(frozen=True, kw_only=True)
class DIST(SoftTargets):
    """Maximize the correlation with the teacher's probabilities over classes and over samples, for strong teachers.

    ``T^2 * (beta * (1 - mean_i pearson(p_i, q_i)) + gamma * (1 - mean_c pearson(p_:c, q_:c)))`` of the softened
    probabilities p and q. Huang et al., 2022, "Knowledge Distillation from A Stronger Teacher".
    https://arxiv.org/abs/2205.10536

    Args:
        beta: weight of the correlation over the classes of a sample.
        gamma: weight of the correlation over the samples of a class; uses the batch of this process.
        temperature: see `SoftTargets`.
        class_dim: see `SoftTargets`.
        weight: see `DistillationLoss`.
        schedule: see `DistillationLoss`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
    """

    beta: NonNegativeFloat = 1.0
    gamma: NonNegativeFloat = 1.0
    temperature: PositiveFloat = 1.0

    @override
    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        p, q = (F.softmax(logits / self.temperature, dim=1) for logits in (student, teacher))
        inter, intra = 1.0 - _pearson(p, q).mean(), 1.0 - _pearson(p.T, q.T).mean()
        return (self.beta * inter + self.gamma * intra) * self.temperature * self.temperature


def _standardized(logits: Tensor) -> Tensor:
    centered = logits - logits.mean(dim=1, keepdim=True)
    return centered / (centered.square().mean(dim=1, keepdim=True).sqrt() + 1e-7)


def _decoupled(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of ``(p_target, 1 - p_target)``, and of the distribution over the other classes."""
    log_p = F.log_softmax(logits, dim=1)
    is_target = F.one_hot(targets, logits.shape[1]).bool()
    others = log_p[~is_target].reshape(len(logits), logits.shape[1] - 1)
    rest = torch.logsumexp(others, dim=1, keepdim=True)
    return torch.cat([log_p[is_target][:, None], rest], dim=1), others - rest


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """The correlation of each row of ``a`` with the same row of ``b``."""
    a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
    return F.cosine_similarity(a, b, dim=1, eps=1e-8)


# Losses over features.


@validated
@dataclass(frozen=True, kw_only=True)
class FeatureHint(FeatureLoss):
    """Regress the teacher's features (hints) through a trained projector r: ``mean((t - r(s))^2) / 2``.

    Romero et al., 2015, "FitNets: Hints for Thin Deep Nets", eq. 3 (there a sum). https://arxiv.org/abs/1412.6550

    Args:
        feature_layers: see `FeatureLoss`.
        projector: see `FeatureLoss`.
        weight: see `DistillationLoss`.
        schedule: see `DistillationLoss`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
    """

    projector: Literal["auto", "conv", "linear", "none"] = "auto"

    @override
    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = same_resolution(student, teacher)
        return F.mse_loss(student, teacher, reduction="sum") / max(student.numel(), 1) / 2

    @override
    def _applies(self, features: Tensor, mask: Tensor) -> bool:
        return features.ndim == 3 and mask.shape == features.shape[:2]


@validated
@dataclass(frozen=True, kw_only=True)
class KnowledgeReview(FeatureLoss):
    """Distill each stage of the student from the teacher's stages of the same depth and of all depths before it.

    ``sum_i sum_(j <= i) D(r_ij(s_i), t_j)`` over the feature layers in order, with projectors r and the hierarchical
    context distance ``D(s, t) = (mse(s, t) + sum_k 2^-k mse(pool_k(s), pool_k(t))) / (1 + sum_k 2^-k)``, where
    ``pool_k`` averages to 4 x 4, 2 x 2 and 1 x 1 positions, where the map is larger. Chen et al., 2021, "Distilling
    Knowledge via Knowledge Review". https://arxiv.org/abs/2104.09044. This is the double sum, without the
    attention based fusion that avoids most of its terms.

    Args:
        feature_layers: see `FeatureLoss`; at least two, from the input to the output.
        projector: see `FeatureLoss`.
        weight: see `DistillationLoss`.
        schedule: see `DistillationLoss`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
    """

    projector: Literal["auto", "conv", "linear", "none"] = "auto"

    @override
    def pairs(self, found: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        return [(student, earlier) for depth, (student, _) in enumerate(found) for _, earlier in found[: depth + 1]]

    @override
    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        s, t = same_resolution(student, teacher)
        total, share, shares = F.mse_loss(s, t), 1.0, 1.0
        for size in (4, 2, 1):
            if s.ndim == 4 and size < min(s.shape[2:]):
                share /= 2
                shares += share
                total = total + share * F.mse_loss(F.adaptive_avg_pool2d(s, size), F.adaptive_avg_pool2d(t, size))
        return total / shares


@validated
@dataclass(frozen=True, kw_only=True)
class SRD(FeatureLoss):
    """Compare batch-normalized features through a linear projector by the logarithm of a power sum.

    ``log(sum(|bn(r(s)) - bn(t)|^exponent))`` over batch and channels, with a batch normalization without weights.
    Miles & Mikolajczyk, 2024, "Understanding the Role of the Projector in Knowledge Distillation".
    https://arxiv.org/abs/2303.11098

    Args:
        exponent: of the absolute difference.
        feature_layers: see `FeatureLoss`; feature maps are averaged over positions.
        projector: see `FeatureLoss`.
        weight: see `DistillationLoss`.
        schedule: see `DistillationLoss`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
    """

    exponent: PositiveFloat = 4.0
    projector: Literal["auto", "conv", "linear", "none"] = "linear"

    @override
    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        s, t = (F.batch_norm(pooled(features), None, None, training=True) for features in (student, teacher))
        return torch.log((s - t).abs().pow(self.exponent).sum())


@validated
@dataclass(frozen=True, kw_only=True)
class AttentionTransfer(FeatureLoss):
    """Compare spatial attention maps: ``mean((Q_s - Q_t)^2)``.

    ``Q`` is the sum of ``|a|^p`` over channels, normalized to length 1. Zagoruyko & Komodakis, 2017, "Paying More
    Attention to Attention". https://arxiv.org/abs/1612.03928. The mean square is that of the authors' code; the paper
    has a norm.

    Args:
        p: the power of an activation.
        feature_layers: see `FeatureLoss`; widths may differ without a projector.
        projector: see `FeatureLoss`.
        weight: see `DistillationLoss`; the authors use 1000 per feature layer.
        schedule: see `DistillationLoss`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
    """

    p: PositiveFloat = 2.0

    same_width: ClassVar[bool] = False

    @override
    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        s, t = (
            F.normalize(features.abs().pow(self.p).mean(dim=1 if features.ndim == 4 else -1).flatten(1))
            for features in same_resolution(student, teacher)
        )
        return F.mse_loss(s, t)


@validated
@dataclass(frozen=True, kw_only=True)
class SimilarityPreserving(FeatureLoss):
    """Compare similarities between the samples of a batch: ``||G_s - G_t||_F^2 / b^2``.

    ``G = A A^T``, with rows normalized to length 1. Tung & Mori, 2019, "Similarity-Preserving Knowledge Distillation".
    https://arxiv.org/abs/1907.09682

    Args:
        feature_layers: see `FeatureLoss`; widths and resolutions may differ without a projector.
        projector: see `FeatureLoss`.
        weight: see `DistillationLoss`; the authors use 3000.
        schedule: see `DistillationLoss`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
    """

    same_width: ClassVar[bool] = False

    @override
    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        s, t = (F.normalize(a @ a.T) for a in (student.flatten(1), teacher.flatten(1)))
        return (s - t).square().sum() / len(s) ** 2


@validated
@dataclass(frozen=True, kw_only=True)
class RKD(FeatureLoss):
    """Compare distances between samples and angles of their triplets, by Huber's loss.

    Distances are relative to the mean distance of the batch.

    Park et al., 2019, "Relational Knowledge Distillation". https://arxiv.org/abs/1904.05068

    Args:
        distance: weight of the distances; 0 leaves them out.
        angle: weight of the angles; 0 leaves them out. They take memory with the batch to the third power.
        feature_layers: see `FeatureLoss`; widths may differ without a projector.
        projector: see `FeatureLoss`.
        weight: see `DistillationLoss`.
        schedule: see `DistillationLoss`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
    """

    distance: NonNegativeFloat = 25.0
    angle: NonNegativeFloat = 50.0

    same_width: ClassVar[bool] = False

    @override
    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        s, t = student.flatten(1), teacher.flatten(1)
        total = s.new_zeros(())
        if self.distance:
            total = total + self.distance * F.smooth_l1_loss(_distances(s), _distances(t))
        return total + self.angle * F.smooth_l1_loss(_angles(s), _angles(t)) if self.angle else total


@validated
@dataclass(frozen=True, kw_only=True)
class ContrastiveHint(FeatureLoss):
    """Contrast the teacher's features of a sample with its features of the other samples of the batch.

    ``-mean_i log(exp(s_i . t_i / T) / sum_j exp(s_i . t_j / T))`` of projected features, averaged over positions and
    normalized to length 1: the objective of Tian et al., 2020, "Contrastive Representation Distillation"
    (https://arxiv.org/abs/1910.10699), with the batch in place of a memory bank, in the form of van den Oord et al.,
    2018, "Representation Learning with Contrastive Predictive Coding", eq. 4. https://arxiv.org/abs/1807.03748

    Args:
        temperature: T.
        feature_layers: see `FeatureLoss`.
        projector: see `FeatureLoss`.
        weight: see `DistillationLoss`.
        schedule: see `DistillationLoss`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
    """

    temperature: PositiveFloat = 0.1
    projector: Literal["auto", "conv", "linear", "none"] = "linear"

    @override
    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        s, t = (F.normalize(pooled(features)) for features in (student, teacher))
        return F.cross_entropy(s @ t.T / self.temperature, torch.arange(len(s), device=s.device))


@validated
@dataclass(frozen=True, kw_only=True)
class ChannelWise(FeatureLoss):
    """Compare the spatial distribution of each channel, for dense prediction.

    ``T^2 / C * sum_c KL(softmax(t_c / T) || softmax(s_c / T))``. The softmax runs over positions; the mean over samples
    is taken. Shu et al., 2021, "Channel-wise Knowledge Distillation for Dense Prediction".
    https://arxiv.org/abs/2011.13256

    Args:
        temperature: T.
        feature_layers: see `FeatureLoss`; without feature_layers the outputs ``(N, C, H, W)``.
        projector: see `FeatureLoss`.
        weight: see `DistillationLoss`.
        schedule: see `DistillationLoss`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
    """

    temperature: PositiveFloat = 4.0

    @override
    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        s, t = (x.flatten(2) / self.temperature for x in same_resolution(student, teacher))
        divergence = F.kl_div(F.log_softmax(s, dim=2), F.softmax(t, dim=2), reduction="sum")
        return divergence * self.temperature * self.temperature / (s.shape[0] * s.shape[1])


@validated
@dataclass(frozen=True, kw_only=True)
class OutputRegression(FeatureLoss):
    """Regress the teacher's outputs (regression values, boxes, logits); mean over all elements that count.

    Ba & Caruana, 2014, "Do Deep Nets Really Need to be Deep?", eq. 2. https://arxiv.org/abs/1312.6184

    Args:
        distance: ``"mse"``, ``"l1"`` or ``"smooth_l1"``.
        feature_layers: see `FeatureLoss`.
        projector: see `FeatureLoss`.
        weight: see `DistillationLoss`.
        schedule: see `DistillationLoss`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
    """

    distance: Literal["mse", "l1", "smooth_l1"] = "mse"

    @override
    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        functions = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}
        total = functions[self.distance](student, teacher, reduction="sum")
        return total / max(student.numel(), 1)

    @override
    def _applies(self, features: Tensor, mask: Tensor) -> bool:
        return mask.shape == features.shape[: mask.ndim]


def _distances(x: Tensor) -> Tensor:
    """Distances between all pairs, relative to the mean distance of different samples."""
    gaps = x[:, None] - x[None]
    squared = gaps.square().sum(dim=2)
    same = torch.eye(len(x), dtype=torch.bool, device=x.device)
    distances = squared.masked_fill(same, 1.0).clamp_min(1e-12).sqrt().masked_fill(same, 0.0)
    return distances / distances[distances > 0].mean() if len(x) > 1 else distances


def _angles(x: Tensor) -> Tensor:
    """Cosine of the angle at j between i and k, for all triplets."""
    gaps = F.normalize(x[None] - x[:, None], dim=2)
    return torch.bmm(gaps, gaps.transpose(1, 2))
