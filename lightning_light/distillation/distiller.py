"""Compute the distillation losses of one training step, and balance them by the norms of their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_light.distillation.alignment import Alignment
from lightning_light.distillation.batch_fields import BatchFields, Positions
from lightning_light.distillation.cache import CachedOutputs
from lightning_light.distillation.feature_pairs import FeaturePairs
from lightning_light.distillation.loss import DistillationLoss
from lightning_light.distillation.student_hook import ForwardCall
from lightning_light.distillation.teacher_modules import TeacherModule
from lightning_light.nested import tensors_in
from lightning_light.selectors import Selector, select

__all__ = ["Distiller", "LossTerm", "OutputSelectors", "StepLosses", "gradient_factors", "weighted_sum"]


@dataclass(frozen=True)
class OutputSelectors:
    """Which parts of the outputs of student and teacher are compared."""

    student: Selector = None
    teacher: Selector = None

    def of_student(self, output: Any) -> Tensor:
        """Select the compared part of the student's output."""
        return select(output, self.student, f"KnowledgeDistillation(output={self.student!r})")

    def of_teacher(self, output: Any) -> Tensor:
        """Select the compared part of the teacher's output."""
        selector = self.student if self.teacher is None else self.teacher
        return select(output, selector, f"KnowledgeDistillation(teacher_output={selector!r})").detach()


@dataclass(frozen=True, eq=False)
class LossTerm:
    """One loss with one teacher, before its weight."""

    name: str
    weight: float
    value: Tensor


@dataclass(frozen=True, eq=False)
class StepLosses:
    """The losses of one training step.

    Attributes:
        terms: of all teachers.
        teacher_output: of the first teacher; None if no loss compares outputs and it is not a tensor.
        positions: that count.
    """

    terms: list[LossTerm]
    teacher_output: Tensor | None
    positions: Positions


@dataclass(frozen=True, eq=False)
class Distiller:
    """Compares the student with its teachers.

    Attributes:
        losses: the losses.
        teachers: the teachers.
        teacher_weights: one per teacher.
        selectors: of the outputs.
        fields: of the batch.
        features: hooks on the feature layers.
        alignment: of student and teacher tensors.
        caches: one per teacher, or none.
    """

    losses: Sequence[DistillationLoss]
    teachers: Sequence[TeacherModule]
    teacher_weights: Sequence[float]
    selectors: OutputSelectors
    fields: BatchFields
    features: FeaturePairs
    alignment: Alignment
    caches: Sequence[CachedOutputs] = ()

    def record(self, enabled: bool) -> None:
        """Start or stop recording calls and features within ``training_step``."""
        for teacher in self.teachers:
            teacher.record(enabled)
        self.features.record_training_step(enabled)

    def step(self, call: ForwardCall, batch: Any, scales: Sequence[float]) -> StepLosses:
        """Compute the losses whose weight is above zero.

        Args:
            call: of the student.
            batch: as ``training_step`` gets it.
            scales: of each loss's weight, at this step.
        """
        positions = self.fields.positions(batch, needs_labels=any(loss.needs_labels for loss in self.losses))
        outputs, terms = [], []
        for place in range(len(self.teachers)):
            outputs.append(self._teacher_output(place, call, batch))
            self.features.match(place)
            terms += self._terms(place, call, outputs[place], positions, scales)
        self.features.clear()
        return StepLosses(terms, outputs[0], positions)

    def _terms(
        self, place: int, call: ForwardCall, output: Tensor | None, positions: Positions, scales: Sequence[float]
    ) -> list[LossTerm]:
        terms = []
        for number, (loss, scale) in enumerate(zip(self.losses, scales, strict=True)):
            weight = self.teacher_weights[place] * loss.weight * scale
            if weight:
                values = [
                    loss(student, teacher, labels=positions.labels, mask=positions.mask)
                    for student, teacher in self._compared(number, place, call, output)
                ]
                terms.append(LossTerm(self._name(number, place), weight, _sum(values)))
        return terms

    def _compared(
        self, number: int, place: int, call: ForwardCall, output: Tensor | None
    ) -> list[tuple[Tensor, Tensor]]:
        loss, key = self.losses[number], f"{number}_{place}"
        if loss.compares_outputs:
            assert output is not None  # computed by `_teacher_output`
            return [self.alignment.outputs(loss, key, self.selectors.of_student(call.output), output)]
        student, teacher = self.features.student, self.teachers[place]
        return [
            self.alignment.features(loss, key, pair, student, teacher) for pair in self.features.features(number, place)
        ]

    def _teacher_output(self, place: int, call: ForwardCall, batch: Any) -> Tensor | None:
        """The compared part of a teacher's output; its features are recorded meanwhile."""
        teacher, inputs = self.teachers[place], self.fields.teacher_inputs(call, batch)
        if self.caches:
            stored = self.caches[place].outputs(
                inputs, batch, lambda: self.selectors.of_teacher(teacher.output(call, inputs))
            )
            dtype = next((parameter.dtype for parameter in teacher.root.parameters()), stored.dtype)
            return stored.to(next(tensors_in((inputs.args, inputs.kwargs))).device, dtype)
        with self.features.recording(place):
            output = teacher.output(call, inputs)
        is_plain = isinstance(output, Tensor) and isinstance(call.output, Tensor)  # enough for the agreement
        if is_plain or any(loss.compares_outputs for loss in self.losses):
            return self.selectors.of_teacher(output)
        return None

    def _name(self, number: int, place: int) -> str:
        names = [loss.name for loss in self.losses]
        name = names[number] if names.count(names[number]) == 1 else f"{names[number]}_{number}"
        return name if len(self.teachers) == 1 else f"{name}_of_teacher_{place}"


def weighted_sum(terms: Sequence[LossTerm], factors: Sequence[float] | None = None) -> Tensor:
    """Sum the losses times their weights and, if given, balancing factors."""
    factors = [1.0] * len(terms) if factors is None else factors
    return _sum([term.weight * factor * term.value for term, factor in zip(terms, factors, strict=True)])


def _sum(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else sum(values[1:], values[0])


def gradient_factors(
    task: Tensor, terms: Sequence[Tensor], parameters: Sequence[nn.Parameter], reduce: Callable[[Tensor], Tensor]
) -> Tensor:
    """Compute for each term the factor at which its gradient norm equals the task's; 1 where it has no gradient.

    Args:
        task: the task's loss.
        terms: the other losses, with their graphs, which are retained.
        parameters: with respect to which gradients are taken.
        reduce: the mean over processes.
    """
    norms = torch.stack([_gradient_norm(loss, parameters) for loss in (task, *terms)])
    norms = reduce(norms)
    factors = norms[0] / norms[1:]
    return torch.where(factors.isfinite() & (factors > 0), factors, torch.ones_like(factors))


def _gradient_norm(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    squares = [gradient.detach().float().square().sum() for gradient in gradients if gradient is not None]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), device=loss.device)
