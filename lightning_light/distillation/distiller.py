"""One run's comparison of a student with its teachers: whom to ask, where to look, what to add."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_light.distillation.cache import TeacherOutputCache, fingerprints
from lightning_light.distillation.feature_layers import FeatureHooks, match_resolutions, pair_feature_layers
from lightning_light.distillation.loss import DistillationLoss, FeatureLoss, pooled, rows
from lightning_light.distillation.projectors import Projectors, channel_source
from lightning_light.distillation.selectors import Selector, labels_of, select
from lightning_light.distillation.self_teacher import InModelTeacher
from lightning_light.distillation.step_patch import Call
from lightning_light.distillation.teachers import Teacher
from lightning_light.example_input import ExampleInput, tensors_in

__all__ = ["Distiller", "Reading", "Term"]


@dataclass(frozen=True)
class Reading:
    """How outputs and batches are read."""

    output: Selector = None
    teacher_output: Selector = None
    inputs: Callable[[Any], Any] | None = None
    labels: Selector = None
    mask: Selector = None
    ignore_index: int | None = None
    sample_index: Selector = None
    fixed_views: bool = False


@dataclass(frozen=True, eq=False)
class Term:
    """One loss of one teacher, before its weight."""

    name: str
    factor: float
    value: Tensor


@dataclass(eq=False)
class Distiller:
    """What is needed to compare, for one fit.

    Attributes:
        student: the module in which student feature_layers are looked up.
        prefix: its path in the LightningModule, with a dot; what names in the edit log begin with.
        teachers: at work.
        factors: of the teachers.
        losses: the losses.
        reading: how outputs and batches are read.
        projectors: made as features are seen.
        caches: one for each teacher, or none.
        chosen: loss -> its pairs of feature_layers; what ``"auto"`` has chosen is added, part of the method's state.
        samples: how many samples the data has, if known.
    """

    student: nn.Module
    prefix: str
    teachers: list[Teacher]
    factors: list[float]
    losses: Sequence[DistillationLoss]
    reading: Reading
    projectors: Projectors
    caches: list[TeacherOutputCache]
    chosen: dict[str, list[list[str]]]
    samples: int | None = None
    said: dict[str, Any] = field(default_factory=dict)
    _listeners: list[FeatureHooks] = field(default_factory=list)

    def listen(self, student: nn.Module | None = None) -> None:
        """Hook the feature_layers, in the modules as they are now.

        Raises:
            TargetError: a tap names no layer.
        """
        self.student = self.student if student is None else student
        if not self._listeners:
            self._listeners = [FeatureHooks() for _ in range(len(self.teachers) + 1)]
        for place, loss in enumerate(self.losses):
            if isinstance(loss, FeatureLoss) and loss.feature_layers not in (None, "auto"):
                for teacher in self.teachers:
                    self._refuse_opaque(teacher, loss)
                    found = loss.pairs(pair_feature_layers(loss.feature_layers, self.student, teacher.root))
                    self.chosen[str(place)] = [list(pair) for pair in found]
        seeking = any(self._seeks(place) for place in range(len(self.losses)))
        pairs = [pair for chosen in self.chosen.values() for pair in chosen]
        models = [self.student, *(teacher.root for teacher in self.teachers)]
        for place, (listener, model) in enumerate(zip(self._listeners, models, strict=True)):
            paths = sorted({pair[min(place, 1)] for pair in pairs})
            if seeking or paths:
                listener.listen(model, None if seeking else paths)
            else:
                listener.remove()

    def switch(self, on: bool) -> None:
        """Keep the student's features from now on, or no longer."""
        live = [teacher for teacher in self.teachers if isinstance(teacher, InModelTeacher)]
        for teacher in live:
            teacher.switch(on)
        for listener, who in zip(self._listeners, [None, *self.teachers], strict=True):
            listener.on = on and (who is None or who in live)

    def compare(self, call: Call, batch: Any, shares: Sequence[float]) -> list[Term]:
        """The losses, of all teachers, whose share is not zero.

        Args:
            call: of the student.
            batch: as ``training_step`` gets it.
            shares: of each loss's weight, at this time.
        """
        mask, labels = self._positions(batch)
        terms: list[Term] = []
        for place, (teacher, factor) in enumerate(zip(self.teachers, self.factors, strict=True)):
            answer = self._ask(place, teacher, call, batch)
            if any(self._seeks(number) for number in range(len(self.losses))):
                self._choose(place)
            for number, (loss, share) in enumerate(zip(self.losses, shares, strict=True)):
                if weight := factor * loss.weight * share:
                    pairs = list(self._pairs(place, number, loss, call, answer))
                    values = [loss(s, t, labels=labels, mask=mask) for s, t in pairs]
                    total = values[0] if len(values) == 1 else sum(values[1:], values[0])
                    terms.append(Term(self._name(number, place), weight, total))
            self._listeners[place + 1].seen.clear()
        self._listeners[0].seen.clear()
        return terms

    def agreement(self, call: Call) -> dict[str, float]:
        """How far student and first teacher agree on the last batch: the same first class, and the divergence."""
        if "answer" not in self.said:
            return {}
        student, teacher = select(call.output, self.reading.output, "output").detach(), self.said["answer"]
        dim = next((loss.class_dim for loss in self.losses if hasattr(loss, "class_dim")), -1)
        if student.shape != teacher.shape or student.ndim < 2 or student.shape[dim] < 2:
            return {}
        s, t = rows(student, dim, self.said["mask"]), rows(teacher, dim, self.said["mask"])
        divergence = F.kl_div(F.log_softmax(s, 1), F.softmax(t, 1), reduction="batchmean")
        return {"agreement": (s.argmax(1) == t.argmax(1)).float().mean().item(), "kl": divergence.item()}

    def follow(self, kept: Mapping[str, Mapping[int, Tensor]], pl_module: nn.Module) -> None:
        """Channels have left the student, or modules were replaced."""
        self.projectors.follow(kept)
        for teacher in self.teachers:
            if isinstance(teacher, InModelTeacher):
                teacher.listen(pl_module)

    def release(self) -> None:
        """Leave no hook behind, and the teachers as they came."""
        for listener in self._listeners:
            listener.remove()
        for teacher in self.teachers:
            teacher.release()

    def _positions(self, batch: Any) -> tuple[Tensor | None, Tensor | None]:
        reading = self.reading
        mask = None if reading.mask is None else select(batch, reading.mask, "mask").bool()
        labels = None
        if reading.ignore_index is not None or any(loss.needs_labels for loss in self.losses):
            labels = labels_of(batch, reading.labels)
        if reading.ignore_index is not None and labels is not None:
            counts = labels != reading.ignore_index
            mask = counts if mask is None else mask & counts
        self.said = {"mask": mask}
        return mask, labels

    def _ask(self, place: int, teacher: Teacher, call: Call, batch: Any) -> Tensor | None:
        """The teacher's answer; its features are heard by the listeners."""
        inputs = self.reading.inputs
        given = ExampleInput(call.args, call.kwargs) if inputs is None else ExampleInput.from_array(inputs(batch))
        if self.caches:
            answer: Tensor | None = self._recall(self.caches[place], teacher, given, batch)
        else:
            raw = teacher.answer(call) if isinstance(teacher, InModelTeacher) else self._listened(place, teacher, given)
            plain = isinstance(raw, Tensor) and isinstance(call.output, Tensor)  # enough for the curve of agreement
            wanted = any(getattr(loss, "feature_layers", None) is None for loss in self.losses)
            answer = self._read(raw) if wanted or plain else None
        if place == 0 and answer is not None:
            self.said["answer"] = answer
        return answer

    def _listened(self, place: int, teacher: Teacher, given: ExampleInput) -> Any:
        listener = self._listeners[place + 1]
        listener.on = True
        try:
            return teacher(given.args, given.kwargs)
        finally:
            listener.on = False

    def _read(self, raw: Any) -> Tensor:
        reading = self.reading
        selector = reading.output if reading.teacher_output is None else reading.teacher_output
        return select(raw, selector, "teacher_output").detach()

    def _recall(self, cache: TeacherOutputCache, teacher: Teacher, given: ExampleInput, batch: Any) -> Tensor:
        first = next(tensors_in((given.args, given.kwargs)))
        index, fixed = self.reading.sample_index, self.reading.fixed_views
        checks = (
            [0] * len(first) if index is not None and fixed else fingerprints((given.args, given.kwargs), len(first))
        )
        keys = checks if index is None else select(batch, index, "sample_index").reshape(-1).tolist()
        answers = cache.get(keys, None if fixed else checks)
        if answers is None:
            answers = cache.put(keys, checks, self._read(teacher(given.args, given.kwargs)))
        if index is None and self.samples is not None and len(cache) > self.samples:
            raise ValueError(
                f"`KnowledgeDistillation(cache=...)`: expected at most {self.samples} different inputs, one for each "
                f"sample of the data, found {len(cache)}: they are augmented, so no stored answer is ever used. "
                "Augment without randomness, or drop `cache`; `sample_index` and `fixed_views=True` take those "
                "of each sample's first view."
            )
        return answers.to(first.device, next((p.dtype for p in teacher.root.parameters()), answers.dtype))

    def _pairs(self, place: int, number: int, loss: DistillationLoss, call: Call, answer: Tensor | None) -> Any:
        """What ``loss`` compares: outputs, or features of each pair of feature_layers, projected."""
        feature_layers = getattr(loss, "feature_layers", None)
        kind = getattr(loss, "projector", "none")
        if feature_layers is None:
            assert answer is not None  # asked for by `_ask`
            mine = select(call.output, self.reading.output, "output")
            yield self._fitting(loss, f"{number}_{place}_output", kind, mine, answer)
            return
        for student, teacher in self.chosen[str(number)]:
            heard = self._listeners[0].seen.get(student), self._listeners[place + 1].seen.get(teacher)
            if heard[0] is None or heard[1] is None:
                raise ValueError(
                    f"`{type(loss).__name__}(feature_layers={feature_layers!r})`: expected `{student}` of the "
                    f"student and `{teacher}` of "
                    "the teacher to be called in a forward pass and to return a tensor, found that "
                    f"{'the student' if heard[0] is None else 'the teacher'} does not. Tap another module."
                )
            key = f"{number}_{place}_{student}_{teacher}".replace(".", "-")
            names = self._sources(student, heard[0], self.teachers[place], teacher, heard[1]) if kind != "none" else ()
            yield self._fitting(loss, key, kind, heard[0], heard[1].detach(), student, *names)

    def _sources(
        self, tap: str, student: Tensor, teacher: Teacher, their_tap: str, theirs: Tensor
    ) -> tuple[str | None, str | None]:
        """Names of the tensors that count the channels of two features, where these may leave during the run."""
        mine = channel_source(self.student, tap, _width(student))
        other = None if teacher.prefix is None else channel_source(teacher.root, their_tap, _width(theirs))
        return mine and f"{self.prefix}{mine}", other and f"{teacher.prefix}{other}"

    def _fitting(
        self,
        loss: DistillationLoss,
        key: str,
        kind: str,
        student: Tensor,
        teacher: Tensor,
        tap: str | None = None,
        source: str | None = None,
        target: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        before = tuple(student.shape)
        projected = self.projectors(key, kind, student, teacher, source, target)
        if projected.ndim != teacher.ndim and teacher.ndim > 2 and projected.ndim == 2:
            teacher = pooled(teacher)
        same = len(projected) == len(teacher)
        if tap is None and loss.same_width:
            same = projected.shape == teacher.shape
        elif loss.same_width:
            same = same and projected.ndim == teacher.ndim and _width(projected) == _width(teacher)
        if not same:
            where = "outputs" if tap is None else f"features at `{tap}`"
            raise ValueError(
                f"`{type(loss).__name__}`: expected {where} of student and teacher with the same classes or channels, "
                f"found {before} and {tuple(teacher.shape)}. Use a teacher of the same task, select what is compared "
                "(`output=`, `teacher_output=`), or, for features, a projector."
            )
        return projected, teacher

    def _seeks(self, number: int) -> bool:
        return getattr(self.losses[number], "feature_layers", None) == "auto" and str(number) not in self.chosen

    def _choose(self, place: int) -> None:
        """Pair the feature_layers that are to be matched by resolution, then listen to no more than is needed."""
        heard = [
            {path: tuple(tensor.shape) for path, tensor in self._listeners[who].seen.items()} for who in (0, place + 1)
        ]
        for number, loss in enumerate(self.losses):
            if self._seeks(number):
                self._refuse_opaque(self.teachers[place], loss)
                found = match_resolutions(*heard)
                self.chosen[str(number)] = [list(pair) for pair in cast("FeatureLoss", loss).pairs(found)]
        seen = [dict(listener.seen) for listener in self._listeners]
        self.listen()
        for listener, kept in zip(self._listeners, seen, strict=True):
            listener.seen.update(kept)

    def _refuse_opaque(self, teacher: Teacher, loss: DistillationLoss) -> None:
        if teacher.is_opaque:
            raise ValueError(
                f"`{type(loss).__name__}(feature_layers={getattr(loss, 'feature_layers', None)!r})`: "
                f"expected a teacher made of modules, "
                f"found a `{type(teacher.module).__name__}`, whose inner features cannot be heard. Compare outputs, or "
                "load the teacher from its checkpoint."
            )

    def _name(self, number: int, place: int) -> str:
        names = [loss.name for loss in self.losses]
        name = names[number] if names.count(names[number]) == 1 else f"{names[number]}_{number}"
        return name if len(self.teachers) == 1 else f"{name}_of_teacher_{place}"


def total_of(terms: Sequence[Term], factors: Sequence[float] | None = None) -> Tensor:
    """The weighted sum."""
    scaled = [
        term.factor * (1.0 if factors is None else factors[place]) * term.value for place, term in enumerate(terms)
    ]
    return scaled[0] if len(scaled) == 1 else sum(scaled[1:], scaled[0])


def _width(features: Tensor) -> int:
    return features.shape[1 if features.ndim == 4 else -1]
