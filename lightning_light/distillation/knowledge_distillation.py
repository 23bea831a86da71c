"""`KnowledgeDistillation`: add distillation losses to the task's loss during ``fit``."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_light.distillation.added_loss import AddedLoss
from lightning_light.distillation.agreement import Agreement
from lightning_light.distillation.alignment import Alignment
from lightning_light.distillation.batch_fields import BatchFields
from lightning_light.distillation.cache import CachedOutputs, StoredOutputs, TeacherCache, samples_of, stores_of
from lightning_light.distillation.checks import check_arguments, check_cache, check_exits
from lightning_light.distillation.distiller import (
    Distiller,
    LossTerm,
    OutputSelectors,
    StepLosses,
    gradient_factors,
    weighted_sum,
)
from lightning_light.distillation.feature_layers import module_at
from lightning_light.distillation.feature_pairs import FeaturePairs
from lightning_light.distillation.loss import DistillationLoss, FeatureLoss
from lightning_light.distillation.losses import SoftTargets
from lightning_light.distillation.projectors import Projectors, ProjectorState
from lightning_light.distillation.self_teacher import SelfTeacherState, copy_of_student, update_average
from lightning_light.distillation.student_hook import ForwardCall, StudentHook
from lightning_light.distillation.teacher_modules import InModelTeacher, SeparateTeacher, TeacherModule
from lightning_light.distillation.teachers import BuiltTeacher, OnlineTeacher, SelfTeacher, TeacherSource, as_source
from lightning_light.host.classes import is_host
from lightning_light.host.patches import InstancePatch
from lightning_light.host.trainer import is_accumulating, is_restoring
from lightning_light.measure.metrics import MetricLike
from lightning_light.order import Stage
from lightning_light.progress import epochs_planned, steps_done, training_progress
from lightning_light.schedules import Schedule, resolve, resolve_moment
from lightning_light.schema import LayerName, Length
from lightning_light.selectors import Selector
from lightning_light.surgery.distributed import log_rank_zero, reduce_gradients, reduce_mean, refuse_sharding
from lightning_light.surgery.optimizer import disown, owners_of, unwrap
from lightning_light.validation import Moment, NonNegativeFloat, NonNegativeInt, PositiveInt, validated

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["KnowledgeDistillation"]

TeacherLike = nn.Module | TeacherSource | Callable[[], nn.Module] | str


@dataclass(eq=False)
class _Run:
    """What exists during one fit.

    Attributes:
        distiller: computes the losses.
        student: records the student's calls.
        projectors: of the features.
        patches: of methods of the user's instance.
        batch: of the current training step.
        has_begun: whether the student was called.
        scalars: to be logged at the end of the step.
    """

    distiller: Distiller
    student: StudentHook
    projectors: Projectors
    patches: list[InstancePatch] = field(default_factory=list)
    batch: Any = None
    has_begun: bool = False
    scalars: dict[str, float] = field(default_factory=dict)

    def release(self) -> None:
        """Undo patches, remove hooks, and restore the teachers' modes."""
        for patch in self.patches:
            patch.undo()
        self.student.remove()
        self.distiller.features.remove()
        for teacher in self.distiller.teachers:
            teacher.release()


class DistillationState(TypedDict, total=False):
    """What `KnowledgeDistillation` keeps in the compression state.

    Attributes:
        projectors: by key.
        feature_layers: number of a loss -> pairs of paths in student and teacher.
        cache: number of a teacher -> its stored outputs.
        factors: loss -> balancing factor.
        self: of a self-teacher.
        averaged: step of the last update of the moving average.
        student: path of the part that ``training_step`` calls.
        used: whether a loss was ever switched on.
    """

    projectors: dict[str, ProjectorState]
    feature_layers: dict[str, list[Annotated[list[str], Length(2)]]]
    cache: dict[str, StoredOutputs]
    factors: dict[str, float]
    self: SelfTeacherState
    averaged: NonNegativeInt
    student: Annotated[str, LayerName()] | None
    used: bool


@validated
@dataclass(eq=False, repr=False)
class KnowledgeDistillation(AddedLoss):
    """Train the network with the outputs or features of a teacher besides its own task.

    Each loss is added to the loss that ``training_step`` returns, bit for bit as hand-written distillation does. The
    teacher is called with the inputs of the student's forward, in evaluation mode, without gradients, in the same
    autocast. It is not part of any state dict or checkpoint.

    Hinton et al., 2015, "Distilling the Knowledge in a Neural Network". https://arxiv.org/abs/1503.02531

    Example:
        >>> from lightning_light.distillation import KnowledgeDistillation
        >>> KnowledgeDistillation("teacher.pt2", stop=0.9)
        KnowledgeDistillation(teacher='teacher.pt2', stop=0.9)

    Args:
        teacher: a module; a function without arguments that builds one, called when a fit begins; `CheckpointTeacher`;
            the path of a TorchScript or ``.pt2`` file; ``"self"`` or `SelfTeacher` for self-distillation from the
            student's initial weights or their moving average; `OnlineTeacher` for a module that is trained along; or
            a list of these.
        losses: one or several losses; by default `SoftTargets`.
        metrics: metrics of torchmetrics, updated on logged batches with the student's output and, as target, the
            teacher's; by default top-1 agreement where outputs are class scores.
        student: path of the module that is distilled, in which feature layers are looked up; None for the
            LightningModule itself or, if ``training_step`` does not call it, the one part of it that it calls.
        output: which part of the student's output is compared: a key or attribute, a position, or a function.
        teacher_output: the same for the teacher; as ``output``, if None.
        batch: which parts of a batch are labels, mask and teacher inputs.
        teacher_weights: of several teachers; equal weights by default.
        stop: epoch (int) or fraction of the run (float) from which on the losses are switched off.
        balance_every_n_steps: optimizer steps between two updates of balancing factors, which scale each loss so that
            its gradient norm equals the task's; None for no balancing.
        cache: stores the teacher's outputs by sample.
        seed: of the projectors.

    Raises:
        ValueError: an argument out of range, or, before the first step, outputs that do not fit together, a teacher
            that cannot be called like the student.
        TargetError: a path of ``feature_layers`` names no module.
        UnsupportedError: a strategy or optimizer that cannot train a projector.

    Note:
        With projectors it has to be the first of the methods in ``callbacks``, as `check_order` lists it, because
        their parameters are added to the optimizer before its state is loaded.
    """

    method: ClassVar[str] = "distillation"
    stage: ClassVar[int] = Stage.DISTILLATION
    state_schema: ClassVar[Any] = DistillationState

    teacher: TeacherLike | list[TeacherLike]
    _: KW_ONLY
    losses: DistillationLoss | list[DistillationLoss] | None = None
    metrics: MetricLike | None = None
    student: str | None = None
    output: Selector = None
    teacher_output: Selector = None
    batch: BatchFields = BatchFields()  # noqa: RUF009  # frozen
    teacher_weights: list[NonNegativeFloat] | None = None
    stop: Moment | None = None
    balance_every_n_steps: PositiveInt | None = None
    cache: TeacherCache | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        losses = SoftTargets() if self.losses is None else self.losses
        self._losses: list[DistillationLoss] = list(losses) if isinstance(losses, list | tuple) else [losses]
        teachers = self.teacher if isinstance(self.teacher, list) else [self.teacher]
        self._sources = [as_source(one) for one in teachers]
        check_arguments(self._losses, self._sources, self.teacher_weights)
        check_exits(self._losses, self._sources, self.teacher_output)
        check_cache(self._losses, self._sources, self.cache)
        self._selectors = OutputSelectors(self.output, self.teacher_output)
        self._agreement = Agreement(self.metrics, self._losses)
        self._schedules: list[Schedule] = []
        self._end = math.inf
        self._run: _Run | None = None
        self.averaged_model: nn.Module | None = None  # surgery changes it along with the student

    # Lightning's hooks, in the order a run meets them.

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Resolve the schedules, so that wrong ones are refused before anything is trained."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._schedules = [resolve(loss.schedule, epochs_planned(trainer)) for loss in self._losses]
            if self.stop is not None:
                call = f"KnowledgeDistillation(..., stop={self.stop})"
                self._end = resolve_moment(self.stop, epochs_planned(trainer), call)

    @override
    def refuse_strategy(self, trainer: Trainer) -> None:
        """Admit `ModelParallelStrategy` for a teacher of its own and losses over outputs."""
        separate = all(isinstance(source, BuiltTeacher) for source in self._sources)
        over_outputs = not any(isinstance(loss, FeatureLoss) for loss in self._losses)
        if not is_host(trainer.strategy, "strategies.ModelParallelStrategy"):
            super().refuse_strategy(trainer)
        elif not (separate and over_outputs and self.balance_every_n_steps is None):
            refuse_sharding(
                trainer,
                type(self).__name__,
                "a self-teacher copies them, and projectors and balancing factors are computed beside them",
                "Use a teacher of its own, losses over outputs such as `SoftTargets`, and no balancing; or distil with "
                "`strategy='ddp'`.",
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the teachers, and add the projectors to the optimizer before its state is loaded."""
        if self._run is not None:
            disown(trainer.optimizers, self._run.projectors.parameters())  # of an earlier fit with the same optimizers
        state = self.state(pl_module)
        if not is_restoring(trainer):
            state.clear()
        student = module_at(pl_module, self.student or "", f"KnowledgeDistillation(student={self.student!r})")
        like = next((p for p in student.parameters() if p.is_floating_point()), torch.empty(0, device=pl_module.device))
        optimizer = next((unwrap(trainer.optimizers[owner]) for owner in owners_of(student, trainer.optimizers)), None)
        projectors = Projectors(state.setdefault("projectors", {}), optimizer, self.seed, like)
        super().on_fit_start(trainer, pl_module)
        teachers = [self._teacher(source, pl_module, like) for source in self._sources]
        _check_shared(teachers, trainer.optimizers)
        self._run = _Run(
            Distiller(
                self._losses,
                teachers,
                self.teacher_weights or [1.0 / len(teachers)] * len(teachers),
                self._selectors,
                self.batch,
                FeaturePairs(student, teachers, self._losses, state.setdefault("feature_layers", {})),
                Alignment(projectors, f"{self.student}." if self.student else ""),
                self._caches(trainer, state, teachers),
            ),
            StudentHook(self.student if self.student is not None else state.get("student")),
            projectors,
        )
        self._run.distiller.features.register()
        self._run.student.register(pl_module)
        self.student_hook = self._run.student
        self._run.patches = self.patch_steps(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch for labels and masks."""
        if self._run is not None:
            self._run.batch = batch

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average the projectors' gradients over DDP's processes, before they are unscaled or clipped."""
        if self._run is not None and trainer.world_size > 1 and not is_accumulating(trainer):
            reduce_gradients(trainer, self._run.projectors.parameters())

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the losses and the agreement."""
        if self._run is None:
            return
        scalars, self._run.scalars, self._run.batch = self._run.scalars, {}, None
        if scalars:
            self.log_scalars(trainer, scalars)

    @override
    def on_surgery(
        self, trainer: Trainer, pl_module: LightningModule, kept: Mapping[str, Mapping[int, Tensor]] | None
    ) -> None:
        """Cut the projectors along with the student, and hook the modules that replaced others."""
        if self._run is not None:
            self._run.projectors.follow(kept or {})
            for teacher in self._run.distiller.teachers:
                teacher.register(pl_module)
            self._run.distiller.features.register(pl_module.get_submodule(self.student or ""))
            self._run.student.register(pl_module)
        if self.averaged_model is not None:
            self.state(pl_module)["self"] = {"weights": dict(self.averaged_model.state_dict())}

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if no loss was ever switched on."""
        if not self.state(pl_module).get("used", False):
            self._no_effect(
                f"no loss had a weight above 0 at any step: `stop={self.stop}`, weights "
                f"{[loss.weight for loss in self._losses]}."
            )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Undo patches, remove hooks and release the teachers."""
        if self._run is not None:
            self._run.release()
        self._run, self.averaged_model = None, None
        super().teardown(trainer, pl_module, stage)

    # Private: preparation of a run.

    def _teacher(self, source: TeacherSource, pl_module: LightningModule, like: Tensor) -> TeacherModule:
        if isinstance(source, OnlineTeacher):
            return InModelTeacher(source.path, pl_module, self.student or "")
        if isinstance(source, BuiltTeacher):
            with torch.random.fork_rng(devices=[]):  # building a network draws random numbers
                return SeparateTeacher(source.build(), like)
        assert isinstance(source, SelfTeacher)
        copied = copy_of_student(pl_module, self.state(pl_module), frozen=source.decay is None)
        part = copied.get_submodule(self.student or "")
        if source.decay is None:
            return SeparateTeacher(part, like)
        self.averaged_model = copied
        return SeparateTeacher(part, like, prefix=f"{self.student}." if self.student else "")

    def _caches(
        self, trainer: Trainer, state: dict[str, Any], teachers: Sequence[TeacherModule]
    ) -> list[CachedOutputs]:
        if self.cache is None:
            return []
        rank = trainer.global_rank if trainer.world_size > 1 else None
        stores = stores_of(self.cache, [teacher.root for teacher in teachers], state, rank)
        return [CachedOutputs(self.cache, store, functools.partial(samples_of, trainer)) for store in stores]

    # Private: one training step.

    @override
    def adds_loss(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        self._update_average(trainer, pl_module)
        return any(self._scales(trainer))

    @override
    def record(self, enabled: bool) -> None:
        super().record(enabled)
        assert self._run is not None  # the patch is undone with the run
        self._run.distiller.record(enabled)

    @override
    def added_loss(self, trainer: Trainer, pl_module: LightningModule, task: Tensor) -> Tensor | None:
        run, scales = self._run, self._scales(trainer)
        assert run is not None
        call, state = run.student.pop() if any(scales) else None, self.state(pl_module)
        if call is None:
            return None
        if not run.has_begun:
            self._begin(run, state)
        pairs = run.distiller.features.pairs
        matched = len(pairs)
        losses = run.distiller.step(call, run.batch, scales)
        if len(pairs) > matched:
            log_rank_zero(trainer, f"{self.method}: feature_layers matched by resolution: {pairs}")
        factors = self._factors(trainer, state, task, losses.terms)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # an attribute set by a connector
        if trainer.loggers and (steps_done(trainer) + 1) % every == 0:
            run.scalars = self._scalars(call, task, losses)
        return weighted_sum(losses.terms, factors)

    def _begin(self, run: _Run, state: dict[str, Any]) -> None:
        """Note, at the first call of this fit, which part of the module is the student."""
        run.has_begun = True
        state |= {"used": True, "student": run.student.path}
        inner = (run.student.path or "") if self.student is None else ""
        for source, teacher in zip(self._sources, run.distiller.teachers, strict=True):
            if isinstance(source, SelfTeacher) and isinstance(teacher, SeparateTeacher):
                teacher.use_part(inner)

    def _update_average(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Update the moving average after each step; not before DDP has broadcast the buffers of the first."""
        state = self.state(pl_module)
        if self.averaged_model is not None and state.get("averaged", 0) != steps_done(trainer):
            decay = next(s.decay for s in self._sources if isinstance(s, SelfTeacher) and s.decay is not None)
            update_average(self.averaged_model, pl_module, decay)
            state["averaged"] = steps_done(trainer)

    def _scales(self, trainer: Trainer) -> list[float]:
        """Factor of each loss's weight at this step; zeros after ``stop``."""
        progress = training_progress(trainer)
        if progress >= self._end:
            return [0.0] * len(self._losses)
        pairs = zip(self._losses, self._schedules, strict=True)
        return [schedule(progress) if loss.weight else 0.0 for loss, schedule in pairs]

    def _factors(
        self, trainer: Trainer, state: dict[str, Any], task: Tensor, terms: Sequence[LossTerm]
    ) -> list[float] | None:
        """Balancing factors, updated every ``balance_every_n_steps``."""
        if self.balance_every_n_steps is None:
            return None
        assert self._run is not None
        known: dict[str, float] = state.setdefault("factors", {})
        if steps_done(trainer) % self.balance_every_n_steps == 0 or any(term.name not in known for term in terms):
            student = self._run.distiller.features.student
            trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
            values = [term.value for term in terms]
            found = gradient_factors(task, values, trained, lambda mean: reduce_mean(trainer, mean))
            known.update(zip([term.name for term in terms], found.tolist(), strict=True))
        return [known[term.name] for term in terms]

    def _scalars(self, call: ForwardCall, task: Tensor, losses: StepLosses) -> dict[str, float]:
        named = {"task_loss": task, **{term.name: term.value for term in losses.terms}}
        values = {name: float(value.detach()) for name, value in named.items()}
        if losses.teacher_output is None:
            return values
        student = self._selectors.of_student(call.output)
        return values | self._agreement.values(student, losses.teacher_output, losses.positions.mask)

    @override
    def check_called(self, pl_module: LightningModule) -> None:
        if self._run is not None and not self._run.has_begun:
            raise ValueError(
                f"`KnowledgeDistillation(..., student={self.student!r})`: expected `training_step` to call "
                f"`{type(pl_module).__name__}{f'.{self.student}' if self.student else ''}`, with gradients on, found "
                "that it does not. Name the module that it calls: `student='net'`."
            )


def _check_shared(teachers: Sequence[TeacherModule], optimizers: Sequence[Any]) -> None:
    """Refuse a separate teacher that an optimizer trains."""
    for teacher in teachers:
        if isinstance(teacher, SeparateTeacher) and (shared := teacher.shared_parameters(optimizers)):
            raise ValueError(
                f"`KnowledgeDistillation({type(teacher.root).__name__}(...))`: expected a teacher that is not trained, "
                f"found {shared} of its parameters in the optimizers. For self-distillation write "
                "`KnowledgeDistillation('self')`, for a module that is trained along `OnlineTeacher(path)`; else give "
                "a copy."
            )
