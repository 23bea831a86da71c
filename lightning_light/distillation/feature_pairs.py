"""The feature layers that each loss compares, and their features in the current training step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_light.distillation.feature_layers import FeatureHooks, match_resolutions, pair_feature_layers
from lightning_light.distillation.loss import DistillationLoss, FeatureLoss
from lightning_light.distillation.teacher_modules import TeacherModule

__all__ = ["FeaturePair", "FeaturePairs"]


@dataclass(frozen=True, eq=False)
class FeaturePair:
    """Features of one layer of the student and one of a teacher."""

    student_layer: str
    teacher_layer: str
    student: Tensor
    teacher: Tensor


class FeaturePairs:
    """Hooks on the feature layers of student and teachers.

    Args:
        student: the module in which the student's feature layers are looked up.
        teachers: the teachers.
        losses: all losses; those of features are known by their type.
        pairs: number of the loss -> pairs of paths. What ``"auto"`` has matched is added; part of the method's state.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Sequence[TeacherModule],
        losses: Sequence[DistillationLoss],
        pairs: dict[str, list[list[str]]],
    ) -> None:
        self.student = student
        self.pairs = pairs
        self._teachers = teachers
        self._losses = {
            number: loss
            for number, loss in enumerate(losses)
            if isinstance(loss, FeatureLoss) and not loss.compares_outputs
        }
        self._student_hooks = FeatureHooks()
        self._teacher_hooks = [FeatureHooks() for _ in teachers]
        self._all_hooks = (self._student_hooks, *self._teacher_hooks)

    def register(self, student: nn.Module | None = None) -> None:
        """Hook the feature layers, in the modules as they are now.

        Args:
            student: replaces the student after a change of its structure.

        Raises:
            TargetError: a path names no module.
            ValueError: a teacher has no inner modules.
        """
        self.student = self.student if student is None else student
        for number, loss in self._losses.items():
            if loss.feature_layers != "auto":
                for teacher in self._teachers:
                    _check_submodules(teacher, loss)
                    found = loss.pairs(pair_feature_layers(loss.feature_layers, self.student, teacher.root))
                    self.pairs[str(number)] = [list(pair) for pair in found]
        self._hook(self._student_hooks, self.student, side=0)
        for hooks, teacher in zip(self._teacher_hooks, self._teachers, strict=True):
            self._hook(hooks, teacher.root, side=1)

    def remove(self) -> None:
        """Remove all hooks."""
        for hooks in self._all_hooks:
            hooks.remove()

    def record_training_step(self, enabled: bool) -> None:
        """Start or stop recording what is called within ``training_step``: the student, and teachers in the model."""
        self._student_hooks.enabled = enabled
        for hooks, teacher in zip(self._teacher_hooks, self._teachers, strict=True):
            hooks.enabled = enabled and teacher.in_training_step

    @contextmanager
    def recording(self, teacher: int) -> Iterator[None]:
        """Record features of a separate teacher while it is called."""
        hooks, separate = self._teacher_hooks[teacher], not self._teachers[teacher].in_training_step
        hooks.enabled |= separate
        try:
            yield
        finally:
            hooks.enabled &= not separate

    def match(self, teacher: int) -> None:
        """Pair the layers of losses with ``feature_layers='auto'`` by the recorded resolutions, once."""
        unmatched = self._unmatched()
        if not unmatched:
            return
        hooks = self._student_hooks, self._teacher_hooks[teacher]
        shapes = [{path: tuple(tensor.shape) for path, tensor in hook.features.items()} for hook in hooks]
        for number, loss in unmatched.items():
            _check_submodules(self._teachers[teacher], loss)
            self.pairs[str(number)] = [list(pair) for pair in loss.pairs(match_resolutions(*shapes))]
        recorded = [dict(hook.features) for hook in self._all_hooks]
        self.register()
        for hook, features in zip(self._all_hooks, recorded, strict=True):
            hook.features.update(features)

    def features(self, number: int, teacher: int) -> Iterator[FeaturePair]:
        """Return the recorded features of a loss's layers.

        Args:
            number: of the loss.
            teacher: number of the teacher.

        Raises:
            ValueError: a layer was not called, or has returned no tensor.
        """
        for student_layer, teacher_layer in self.pairs[str(number)]:
            ours = self._student_hooks.features.get(student_layer)
            theirs = self._teacher_hooks[teacher].features.get(teacher_layer)
            if ours is None or theirs is None:
                loss = self._losses[number]
                raise ValueError(
                    f"`{type(loss).__name__}(feature_layers={loss.feature_layers!r})`: expected `{student_layer}` of "
                    f"the student and `{teacher_layer}` of the teacher to be called in a forward pass and to return a "
                    f"tensor, found that {'the student' if ours is None else 'the teacher'}'s layer does not. Name "
                    "another module."
                )
            yield FeaturePair(student_layer, teacher_layer, ours, theirs.detach())

    def clear(self) -> None:
        """Forget the features of this step."""
        for hooks in self._all_hooks:
            hooks.features.clear()

    def _unmatched(self) -> dict[int, FeatureLoss]:
        return {number: loss for number, loss in self._losses.items() if str(number) not in self.pairs}

    def _hook(self, hooks: FeatureHooks, model: nn.Module, side: int) -> None:
        paths = sorted({pair[side] for pairs in self.pairs.values() for pair in pairs})
        if self._unmatched():
            hooks.register(model, None)
        elif paths:
            hooks.register(model, paths)
        else:
            hooks.remove()


def _check_submodules(teacher: TeacherModule, loss: FeatureLoss) -> None:
    if not teacher.has_submodules:
        raise ValueError(
            f"`{type(loss).__name__}(feature_layers={loss.feature_layers!r})`: expected a teacher made of modules, "
            f"found a `{type(teacher.root).__name__}`, whose inner layers cannot be hooked. Compare outputs, or load "
            "the teacher from its checkpoint."
        )
