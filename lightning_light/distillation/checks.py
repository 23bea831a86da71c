"""What is refused before anything is trained, and what the Trainer is asked."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any

from lightning_light.distillation.loss import DistillationLoss
from lightning_light.distillation.self_teacher import InModelTeacher
from lightning_light.distillation.teachers import LiveTeacher, SelfTeacher, Teacher, TeacherSource, shared_parameters

__all__ = ["check_arguments", "check_exits", "end_of", "refuse_shared", "samples_of"]


def check_arguments(
    losses: Sequence[DistillationLoss],
    sources: Sequence[TeacherSource],
    weights: Sequence[float] | None,
    cache: str | None,
    balance_every: int,
    stop: float | None,
) -> None:
    """Refuse arguments of `KnowledgeDistillation` that do not go together."""
    if wrong := [loss for loss in losses if not isinstance(loss, DistillationLoss)]:
        raise TypeError(
            f"`KnowledgeDistillation(losses=[{wrong[0]!r}])`: expected distillation losses, found "
            f"{type(wrong[0]).__name__}. Write for instance `losses=[SoftTargets(temperature=4.0)]`."
        )
    if not losses or not sources:
        raise ValueError("`KnowledgeDistillation(...)`: expected at least one teacher and one loss, found none.")
    if weights is not None and (len(weights) != len(sources) or min(weights) < 0):
        raise ValueError(
            f"`KnowledgeDistillation(teacher_weights={weights})`: expected a weight >= 0 for each of {len(sources)} "
            "teachers."
        )
    if balance_every < 0:
        raise ValueError(f"`KnowledgeDistillation(balance_every={balance_every})`: expected steps >= 0; 0 for never.")
    if stop is not None and not (stop >= 0 and (isinstance(stop, int) or stop <= 1)):
        raise ValueError(
            f"`KnowledgeDistillation(stop={stop})`: expected a fraction of the run (float in [0, 1]) or an epoch "
            "(int >= 0)."
        )
    if len([s for s in sources if isinstance(s, SelfTeacher)]) > 1:
        raise ValueError("`KnowledgeDistillation(teacher=[...])`: expected one `SelfTeacher` at most, found several.")
    if cache is not None:
        _check_cache(losses, sources, cache)


def check_exits(losses: Sequence[DistillationLoss], sources: Sequence[TeacherSource], teacher_output: object) -> None:
    """Refuse a student whose output would be compared with itself."""
    of_outputs = [loss for loss in losses if getattr(loss, "feature_layers", None) is None]
    if LiveTeacher() in sources and of_outputs and teacher_output is None:
        raise ValueError(
            f"`KnowledgeDistillation(teacher=LiveTeacher(), losses=[{type(of_outputs[0]).__name__}(...)])`: expected "
            "two exits of the student, found one output, which would be compared with itself. Name the exit that "
            "learns, `output=...`, and the one that teaches, `teacher_output=...`."
        )


def refuse_shared(teacher: Teacher, optimizers: Sequence[Any]) -> None:
    """A teacher that is trained along is no teacher, unless the user says so."""
    if not isinstance(teacher, InModelTeacher) and (shared := shared_parameters(teacher.root, optimizers)):
        raise ValueError(
            f"`KnowledgeDistillation(teacher={type(teacher.root).__name__})`: expected a teacher of its own, found "
            f"{shared} of its parameters among those that the optimizers change. For the student as teacher write "
            "`'self'`; for what is trained along, `LiveTeacher(path)`; else give a copy."
        )


def end_of(stop: int | float | None, max_epochs: int | None) -> float:
    """Progress at which the teacher stops; beyond 1 for never.

    Raises:
        ValueError: ``stop`` counts epochs, and the run does not.
    """
    if stop is None or isinstance(stop, float):
        return 2.0 if stop is None else stop
    if max_epochs is None or max_epochs < 1:
        raise ValueError(
            f"`KnowledgeDistillation(stop={stop})` counts epochs, but this Trainer has max_epochs={max_epochs}. Give a "
            "fraction of the run, or set `Trainer(max_epochs=...)`."
        )
    return stop / max_epochs


def samples_of(trainer: Any) -> int | None:
    """How many samples the training data has, where it can say so."""
    dataset = getattr(trainer.train_dataloader, "dataset", None)
    return len(dataset) if isinstance(dataset, Sized) else None


def _check_cache(losses: Sequence[DistillationLoss], sources: Sequence[TeacherSource], cache: str) -> None:
    if tapped := [loss for loss in losses if getattr(loss, "feature_layers", None) is not None]:
        raise ValueError(
            f"`KnowledgeDistillation(cache={cache!r})`: expected losses of outputs, which are what is stored; "
            f"found `{type(tapped[0]).__name__}` with feature_layers. Leave `cache` or the feature_layers out."
        )
    moving = [s for s in sources if isinstance(s, LiveTeacher) or (isinstance(s, SelfTeacher) and s.decay is not None)]
    if moving:
        raise ValueError(
            f"`KnowledgeDistillation(cache={cache!r})`: expected a teacher that stays as it is, found `{moving[0]!r}`."
        )
