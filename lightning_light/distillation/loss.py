"""Base classes of distillation losses: frozen values that compare outputs or features of student and teacher."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_light.criteria.output_distance import exact
from lightning_light.schedules import Constant, Schedule
from lightning_light.validation import NonNegativeFloat, validated

__all__ = ["DistillationLoss", "Decreasing", "FeatureLayers", "FeatureLoss"]

FeatureLayers = str | list[str] | dict[str, str] | None
"""Paths of modules: one or several, equal in student and teacher, or student path -> teacher path."""


@validated
@dataclass(frozen=True)
class Decreasing(Schedule):
    """Reverse a schedule, for a loss that fades out: ``1 - schedule(progress)``.

    Args:
        schedule: the rising schedule.

    Example:
        >>> from lightning_light.schedules import Linear
        >>> [Decreasing(Linear())(progress) for progress in (0.0, 0.5, 1.0)]
        [1.0, 0.5, 0.0]
    """

    schedule: Schedule

    @override
    def __call__(self, progress: float) -> float:
        return 1.0 - self.schedule(progress)


@validated
@dataclass(frozen=True, kw_only=True)
class DistillationLoss(ABC):
    """Compare student and teacher; the loss is added to the task's loss times ``weight * schedule(progress)``.

    Args:
        weight: factor of the loss, >= 0.
        schedule: progress -> factor of ``weight`` in [0, 1].

    Raises:
        ValueError: ``weight`` is negative.
    """

    weight: NonNegativeFloat = 1.0
    schedule: Schedule = Constant()

    needs_labels: ClassVar[bool] = False
    """Whether it reads the labels of the batch."""

    same_width: ClassVar[bool] = True
    """Whether the student's (projected) and the teacher's tensor must have equally many classes or channels."""

    @property
    def name(self) -> str:
        """Key of the logged loss, ``soft_targets`` for `SoftTargets`."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(self).__name__).lower()

    @property
    def compares_outputs(self) -> bool:
        """Whether the outputs of student and teacher are compared, not features of inner layers."""
        return True

    @abstractmethod
    def __call__(
        self, student: Tensor, teacher: Tensor, *, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Compute the loss, a scalar.

        Args:
            student: output or features of the student, with their graph.
            teacher: output or features of the teacher, of the same shape unless `same_width` is False.
            labels: of each position, for losses that need them.
            mask: which positions count; None for all.
        """


@validated
@dataclass(frozen=True, kw_only=True)
class FeatureLoss(DistillationLoss):
    """Compare features of inner layers or, without ``feature_layers``, the outputs.

    Args:
        feature_layers: module paths, globs allowed, equal in both networks (``"layer3"``, ``["layer2", "layer3"]``),
            or student path -> teacher path; ``"auto"`` pairs the last layers of each resolution. None: the outputs.
        projector: layer that maps the student's features to the teacher's width and is trained with the student:
            ``"conv"`` (1x1), ``"linear"`` (on averaged positions), ``"auto"`` (by the number of dimensions) or
            ``"none"``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or, before the first step, the widths of student and teacher differ and
            there is no projector.
        TargetError: before the first step: a path names no module.
    """

    feature_layers: FeatureLayers = None
    projector: Literal["auto", "conv", "linear", "none"] = "none"

    @property
    @override
    def compares_outputs(self) -> bool:
        return self.feature_layers is None

    @override
    def __call__(
        self, student: Tensor, teacher: Tensor, *, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        student, teacher = exact(student), exact(teacher)
        if mask is not None and self._applies(student, mask):
            student, teacher = student[mask.bool()], teacher[mask.bool()]
        return self.compare(student, teacher)

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the distance of the student's projected features to the teacher's, a scalar.

        Args:
            student: features in single precision at least.
            teacher: features in single precision at least.
        """

    def pairs(self, found: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Return the pairs of feature layers to compare; a loss may override the given pairing."""
        return list(found)

    def _applies(self, features: Tensor, mask: Tensor) -> bool:
        """Whether ``mask`` selects positions of ``features``."""
        return False


def rows(tensor: Tensor, class_dim: int, mask: Tensor | None = None) -> Tensor:
    """Reshape to ``(positions, classes)``, with the positions of ``mask`` only."""
    flat = exact(tensor).movedim(class_dim, -1).reshape(-1, tensor.shape[class_dim])
    return flat if mask is None else flat[mask.reshape(-1).bool()]


def kullback_leibler(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 * mean over rows of KL(softmax(teacher / T) || softmax(student / T))``."""
    log_p = F.log_softmax(student / temperature, dim=1)
    divergence = F.kl_div(log_p, F.softmax(teacher / temperature, dim=1), reduction="sum")
    return divergence / max(len(student), 1) * temperature * temperature


def same_resolution(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average two feature maps to the coarser of their resolutions; other features are returned as they are."""
    if student.ndim != 4 or teacher.ndim != 4 or student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    return F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)


def pooled(features: Tensor) -> Tensor:
    """Average ``(N, C, *positions)`` or ``(N, T, C)`` over positions to ``(N, C)``."""
    if features.ndim == 3:
        return features.mean(dim=1)
    return features.flatten(2).mean(dim=2) if features.ndim > 3 else features
