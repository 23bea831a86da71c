"""Distillation losses over logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_light.distillation.loss import DistillationLoss, kullback_leibler, rows
from lightning_light.validation import NonNegativeFloat, PositiveFloat, validated

__all__ = ["DIST", "DKD", "LogitStandardization", "SoftTargets"]


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
