"""Agreement of student and teacher, as metrics of torchmetrics on the logged training batches."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_light.distillation.loss import DistillationLoss, rows
from lightning_light.distillation.losses import SoftTargets
from lightning_light.measure.metrics import MetricLike, Top1Agreement, local_copy, metric_values

__all__ = ["Agreement"]


class Agreement:
    """Computes metrics of the student's output with the teacher's output as target.

    Args:
        metrics: updated with (student's output, teacher's output); by default top-1 agreement for classification.
        losses: whether outputs are class scores, and in which dimension, is taken from them.
    """

    def __init__(self, metrics: MetricLike | None, losses: Sequence[DistillationLoss]) -> None:
        self._given = None if metrics is None else local_copy(metrics)
        self._class_dim = _class_dim_of(losses)
        self._default = local_copy(Top1Agreement(class_dim=-1))

    def values(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> dict[str, float]:
        """Compute the metrics of one batch in this process.

        Args:
            student: the student's output.
            teacher: the teacher's output.
            mask: which positions count; None for all.
        """
        dim = -1 if self._class_dim is None else self._class_dim
        if self._given is not None:
            if mask is not None:
                student, teacher = rows(student, dim, mask), rows(teacher, dim, mask)
            return _computed("", self._given, student, teacher)
        if self._class_dim is None or student.shape != teacher.shape or student.ndim < 2 or student.shape[dim] < 2:
            return {}
        return _computed("agreement", self._default, rows(student, dim, mask), rows(teacher, dim, mask))


def _computed(name: str, metric: MetricLike, student: Tensor, teacher: Tensor) -> dict[str, float]:
    metric.to(student.device)
    metric.update(student.detach(), teacher)
    try:
        return metric_values({name or _name_of(metric): metric})
    finally:
        metric.reset()


def _name_of(metric: MetricLike) -> str:
    """The members of a collection have names of their own."""
    return "" if isinstance(metric, dict) or hasattr(metric, "keys") else type(metric).__name__.lower()


def _class_dim_of(losses: Sequence[DistillationLoss]) -> int | None:
    """The dimension of the classes; None if outputs are compared, but not as class scores."""
    of_outputs = [loss for loss in losses if loss.compares_outputs]
    found = [loss.class_dim for loss in of_outputs if isinstance(loss, SoftTargets)]
    if found:
        return found[0]
    return None if of_outputs else -1
