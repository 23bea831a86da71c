"""What a distillation loss is: a frozen value that compares what the student says with what the teacher says."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_light.schedules import Constant, Schedule

__all__ = ["DistillationLoss", "Decreasing", "FeatureLoss", "Taps"]

Taps = str | list[str] | dict[str, str] | None
"""Where features are taken: one path or several, the same in student and teacher, or student path -> teacher path."""


@dataclass(frozen=True)
class Decreasing(Schedule):
    """The other way round, for a loss that fades out: ``1 - schedule(progress)``.

    Args:
        schedule: how fast it falls.

    Example:
        >>> from lightning_light.schedules import Linear
        >>> [Decreasing(Linear())(progress) for progress in (0.0, 0.5, 1.0)]
        [1.0, 0.5, 0.0]
    """

    schedule: Schedule

    @override
    def __call__(self, progress: float) -> float:
        return 1.0 - self.schedule(progress)


@dataclass(frozen=True, kw_only=True)
class DistillationLoss(ABC):
    """Compares outputs of student and teacher; added to the task's loss times ``weight * schedule(progress)``.

    Args:
        weight: its factor, not negative.
        schedule: progress -> share of ``weight``.
    """

    weight: float = 1.0
    schedule: Schedule = Constant()

    needs_labels: ClassVar[bool] = False
    """Whether it reads the labels of the batch."""

    same_width: ClassVar[bool] = True
    """Whether student and teacher, projected, must have as many classes or channels."""

    def __post_init__(self) -> None:
        if not self.weight >= 0.0:
            raise ValueError(
                f"`{type(self).__name__}(weight={self.weight})`: expected a weight >= 0. To leave it out, drop it."
            )

    @property
    def name(self) -> str:
        """The key of its curve: ``soft_targets`` for `SoftTargets`."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(self).__name__).lower()

    @abstractmethod
    def __call__(
        self, student: Tensor, teacher: Tensor, *, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """A scalar.

        Args:
            student: what the student says, with its graph.
            teacher: what the teacher says, of the same shape unless the loss says otherwise.
            labels: of each position, for losses that need them.
            mask: which positions count; all, if None.
        """


@dataclass(frozen=True, kw_only=True)
class FeatureLoss(DistillationLoss):
    """Compares features from inside, or, without ``feature_layers``, the outputs.

    Args:
        feature_layers: module paths, globs allowed, equal in both networks (``"layer3"``, ``["layer2", "layer3"]``),
            or student path -> teacher path; ``"auto"`` pairs the last layers of each resolution. None: the outputs.
        projector: what brings the student's features to the teacher's width and is trained with the student:
            ``"conv"`` (1x1), ``"linear"`` (on averaged positions), ``"auto"`` (by the number of dimensions) or
            ``"none"``.
    """

    feature_layers: Taps = None
    projector: Literal["auto", "conv", "linear", "none"] = "none"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.projector not in ("auto", "conv", "linear", "none"):
            raise ValueError(
                f"`{type(self).__name__}(projector={self.projector!r})`: expected 'auto', 'conv', 'linear' or 'none'."
            )

    @override
    def __call__(
        self, student: Tensor, teacher: Tensor, *, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        student, teacher = exact(student), exact(teacher)
        if mask is not None and self._counts(student, mask):
            student, teacher = student[mask.bool()], teacher[mask.bool()]
        return self.compare(student, teacher)

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """A scalar: how far the student's features, projected, are from the teacher's.

        Args:
            student: in single precision at least, as the teacher's.
            teacher: the teacher's.
        """

    def pairs(self, found: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Pairs of feature layers to compare; a loss may override the given pairing."""
        return list(found)

    def _counts(self, features: Tensor, mask: Tensor) -> bool:
        """Whether only the positions of ``mask`` are compared."""
        return False


def check_positive(loss: object, **values: float) -> None:
    """Refuse temperatures and the like that are not above zero."""
    for name, value in values.items():
        if not value > 0.0:
            raise ValueError(f"`{type(loss).__name__}({name}={value})`: expected a number above 0.")


def exact(tensor: Tensor) -> Tensor:
    """In single precision at least: a softmax in half precision loses the small probabilities it is about."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def rows(tensor: Tensor, class_dim: int, mask: Tensor | None = None) -> Tensor:
    """``tensor`` as ``(positions, classes)``, those of ``mask`` only."""
    flat = exact(tensor).movedim(class_dim, -1).reshape(-1, tensor.shape[class_dim])
    return flat if mask is None else flat[mask.reshape(-1).bool()]


def kullback_leibler(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 * mean over rows of KL(softmax(teacher / T) || softmax(student / T))``."""
    log_p = F.log_softmax(student / temperature, dim=1)
    divergence = F.kl_div(log_p, F.softmax(teacher / temperature, dim=1), reduction="sum")
    return divergence / max(len(student), 1) * temperature * temperature


def same_resolution(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Two feature maps at the coarser of their resolutions, by averaging; other features as they are."""
    if student.ndim != 4 or teacher.ndim != 4 or student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    return F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)


def pooled(features: Tensor) -> Tensor:
    """``(N, C, *positions)`` or ``(N, T, C)`` averaged over positions to ``(N, C)``."""
    if features.ndim == 3:
        return features.mean(dim=1)
    return features.flatten(2).mean(dim=2) if features.ndim > 3 else features
