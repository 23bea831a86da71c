"""Project the student's features to the teacher's width, and check that the two tensors can be compared."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_light.distillation.feature_pairs import FeaturePair
from lightning_light.distillation.loss import DistillationLoss, FeatureLoss, pooled
from lightning_light.distillation.projectors import Projectors, channel_source
from lightning_light.distillation.teacher_modules import TeacherModule

__all__ = ["Alignment"]


class Alignment:
    """Makes the tensors of student and teacher comparable.

    Args:
        projectors: of the run; made when the first features are seen.
        prefix: of the student's tensor names in the LightningModule, with a dot.
    """

    def __init__(self, projectors: Projectors, prefix: str) -> None:
        self.projectors = projectors
        self._prefix = prefix

    def outputs(self, loss: DistillationLoss, key: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Align the outputs of student and teacher.

        Args:
            loss: that compares them.
            key: of the loss and the teacher.
            student: the student's output.
            teacher: the teacher's output.

        Raises:
            ValueError: the shapes do not fit.
        """
        projected = self.projectors(f"{key}_output", _projector_of(loss), student, teacher, None)
        projected, teacher = _same_rank(projected, teacher)
        fits = projected.shape == teacher.shape if loss.same_width else len(projected) == len(teacher)
        _check(fits, loss, "outputs", student, teacher)
        return projected, teacher

    def features(
        self, loss: DistillationLoss, key: str, pair: FeaturePair, student: nn.Module, teacher: TeacherModule
    ) -> tuple[Tensor, Tensor]:
        """Align the features of a pair of layers.

        Args:
            loss: that compares them.
            key: of the loss and the teacher.
            pair: the features.
            student: the module in which the student's layer is looked up.
            teacher: the teacher.

        Raises:
            ValueError: the shapes do not fit.
        """
        kind = _projector_of(loss)
        source = target = None
        if kind != "none":  # the tensors that pruning may cut along with the projector
            found = channel_source(student, pair.student_layer, _width(pair.student))
            source = found and f"{self._prefix}{found}"
            if teacher.prefix is not None:
                found = channel_source(teacher.root, pair.teacher_layer, _width(pair.teacher))
                target = found and f"{teacher.prefix}{found}"
        key = f"{key}_{pair.student_layer}_{pair.teacher_layer}".replace(".", "-")
        projected = self.projectors(key, kind, pair.student, pair.teacher, source, target)
        projected, theirs = _same_rank(projected, pair.teacher)
        fits = len(projected) == len(theirs)
        if loss.same_width:
            fits = fits and projected.ndim == theirs.ndim and _width(projected) == _width(theirs)
        _check(fits, loss, f"features at `{pair.student_layer}`", pair.student, theirs)
        return projected, theirs


def _projector_of(loss: DistillationLoss) -> str:
    return loss.projector if isinstance(loss, FeatureLoss) else "none"


def _same_rank(projected: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average the teacher's positions where the projector has averaged the student's."""
    averaged = projected.ndim == 2 and teacher.ndim > 2
    return projected, pooled(teacher) if averaged else teacher


def _check(fits: bool, loss: DistillationLoss, what: str, student: Tensor, teacher: Tensor) -> None:
    if not fits:
        raise ValueError(
            f"`{type(loss).__name__}`: expected {what} of student and teacher with the same classes or channels, found "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}. Use a teacher of the same task, select what is "
            "compared (`output=`, `teacher_output=`), or, for features, a projector."
        )


def _width(features: Tensor) -> int:
    return features.shape[1 if features.ndim == 4 else -1]
