"""Check relations between arguments of `KnowledgeDistillation`, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_light.distillation.cache import TeacherCache
from lightning_light.distillation.loss import DistillationLoss
from lightning_light.distillation.teachers import OnlineTeacher, SelfTeacher, TeacherSource
from lightning_light.selectors import Selector

__all__ = ["check_arguments", "check_cache", "check_exits"]


def check_arguments(
    losses: Sequence[DistillationLoss], sources: Sequence[TeacherSource], weights: Sequence[float] | None
) -> None:
    """Check that there are teachers and losses, and a weight per teacher.

    Raises:
        ValueError: the arguments do not go together.
    """
    if not losses or not sources:
        raise ValueError(
            "`KnowledgeDistillation(...)`: expected at least one teacher and one loss, found none. Leave `losses` out "
            "for `SoftTargets()`."
        )
    if weights is not None and len(weights) != len(sources):
        raise ValueError(
            f"`KnowledgeDistillation(..., teacher_weights={weights})`: expected a weight for each of "
            f"{len(sources)} teachers, found {len(weights)}. Leave it out for equal weights."
        )
    if len([source for source in sources if isinstance(source, SelfTeacher)]) > 1:
        raise ValueError(
            "`KnowledgeDistillation([...])`: expected at most one `SelfTeacher`, found several. Remove the others."
        )


def check_exits(losses: Sequence[DistillationLoss], sources: Sequence[TeacherSource], teacher_output: Selector) -> None:
    """Check that an exit of the student is not compared with itself.

    Raises:
        ValueError: it would be.
    """
    of_outputs = [loss for loss in losses if loss.compares_outputs]
    if OnlineTeacher() in sources and of_outputs and teacher_output is None:
        raise ValueError(
            f"`KnowledgeDistillation(OnlineTeacher(), losses=[{type(of_outputs[0]).__name__}(...)])`: expected two "
            "exits of the student, found one output, which would be compared with itself. Name the exit that is "
            "distilled, `output=...`, and the exit it learns from, `teacher_output=...`."
        )


def check_cache(
    losses: Sequence[DistillationLoss], sources: Sequence[TeacherSource], cache: TeacherCache | None
) -> None:
    """Check that what is cached stays the same during a fit.

    Raises:
        ValueError: a loss compares features, or a teacher changes.
    """
    if cache is None:
        return
    if of_features := [loss for loss in losses if not loss.compares_outputs]:
        raise ValueError(
            f"`KnowledgeDistillation(..., cache={cache})`: expected losses of outputs, which are what is cached; found "
            f"`{type(of_features[0]).__name__}` with feature_layers. Leave `cache` or the feature_layers out."
        )
    if changing := [source for source in sources if not source.is_constant]:
        raise ValueError(
            f"`KnowledgeDistillation(..., cache={cache})`: expected a teacher that does not change, found "
            f"`{changing[0]!r}`. Leave `cache` out."
        )
