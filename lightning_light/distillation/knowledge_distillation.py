"""`KnowledgeDistillation`: a teacher helps throughout the training."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_light.callback import CompressionCallback
from lightning_light.distillation.cache import TeacherOutputCache, caches_of
from lightning_light.distillation.checks import check_arguments, check_exits, end_of, refuse_shared, samples_of
from lightning_light.distillation.distiller import Distiller, Reading, Term, total_of
from lightning_light.distillation.feature_layers import part_of
from lightning_light.distillation.logits import SoftTargets
from lightning_light.distillation.loss import DistillationLoss
from lightning_light.distillation.loss_balancing import gradient_factors
from lightning_light.distillation.projectors import Projectors, discard, owner_of
from lightning_light.distillation.selectors import Selector
from lightning_light.distillation.self_teacher import InModelTeacher, copy_of_student, move_towards
from lightning_light.distillation.step_patch import StudentHook, Wrapping, add_to
from lightning_light.distillation.teachers import LiveTeacher, SelfTeacher, Teacher, TeacherSource, as_source
from lightning_light.order import Stage
from lightning_light.progress import steps_done, training_progress
from lightning_light.schedules import Schedule, resolve
from lightning_light.surgery.distributed import log_rank_zero, reduce_mean

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["KnowledgeDistillation"]

TeacherLike = nn.Module | TeacherSource | Callable[[], nn.Module] | str


class KnowledgeDistillation(CompressionCallback):
    """Train the network on what a teacher says, besides its own task; ``training_step`` stays as it is.

    Each loss is added to what ``training_step`` returns, equal to hand-written distillation to the last bit. The
    teacher sees what the student's forward got, in evaluation mode, without gradients, in the same autocast; it is in
    no state dict and no checkpoint.

    Hinton et al., 2015, "Distilling the Knowledge in a Neural Network". https://arxiv.org/abs/1503.02531

    Example:
        >>> from lightning_light.distillation import KnowledgeDistillation
        >>> KnowledgeDistillation(teacher="teacher.pt2", stop=0.9)
        KnowledgeDistillation(teacher='teacher.pt2', stop=0.9)

    Args:
        teacher: a module; a function without arguments that makes one, called when a fit begins; `CheckpointTeacher`;
            the path of a TorchScript or ``.pt2`` file; ``"self"`` or `SelfTeacher`, the student before compression or
            its moving average; `LiveTeacher`, what is trained along; or several of these.
        losses: what is compared; by default ``[SoftTargets()]``.
        student: path of the module that is distilled; None for the LightningModule itself or, if ``training_step``
            does not call it, the one part of it that it calls. Taps are looked up in it.
        output: which part of the student's output is compared: a key or attribute, a position, or a function.
        teacher_output: the same for the teacher; as ``output``, if None.
        inputs: batch -> what the teacher is called with (a tuple is arguments, a dict is keyword arguments), where that
            is not what the student's forward got.
        labels: which part of a batch has the labels; by default the second, or what is called so.
        mask: which part of a batch says what positions count, for instance ``"attention_mask"``.
        ignore_index: positions with this label do not count.
        teacher_weights: of several teachers; equal shares by default.
        stop: epoch (int) or fraction of the run (float) from which on the teacher is no longer asked.
        balance_every: every so many steps, each loss is scaled so that its gradient is as long as the task's; 0: never.
        cache: ``"memory"``, or the path of files, in which the teacher's outputs are kept, so that they cost nothing
            from the second epoch on.
        sample_index: which part of a batch numbers its samples, for the cache; without it a sample is known by its
            content.
        fixed_views: that a stored answer shall be used for a sample that looks different by now.
        cache_half: whether the cache stores half precision.
        seed: of the projectors.

    Raises:
        ValueError: an argument out of range, or, before the first step, outputs that do not fit together, a teacher
            that cannot be called like the student.
        TargetError: a tap names no layer.
        UnsupportedError: a strategy or optimizer that cannot take a projector.

    Note:
        With projectors it should be the first of the methods in ``callbacks``, as `check_order` lists it: they are
        given to the optimizer before its state is loaded.
    """

    method: ClassVar[str] = "distillation"
    stage: ClassVar[int] = Stage.DISTILLATION

    def __init__(
        self,
        *,
        teacher: TeacherLike | list[TeacherLike] = "self",
        losses: list[DistillationLoss] | None = None,
        student: str | None = None,
        output: Selector = None,
        teacher_output: Selector = None,
        inputs: Callable[[Any], Any] | None = None,
        labels: Selector = None,
        mask: Selector = None,
        ignore_index: int | None = None,
        teacher_weights: list[float] | None = None,
        stop: int | float | None = None,
        balance_every: int = 0,
        cache: str | None = None,
        sample_index: Selector = None,
        fixed_views: bool = False,
        cache_half: bool = False,
        seed: int = 0,
    ) -> None:
        self.teacher = teacher
        self.losses = losses
        self.student = student
        self.output = output
        self.teacher_output = teacher_output
        self.inputs = inputs
        self.labels = labels
        self.mask = mask
        self.ignore_index = ignore_index
        self.teacher_weights = teacher_weights
        self.stop = stop
        self.balance_every = balance_every
        self.cache = cache
        self.sample_index = sample_index
        self.fixed_views = fixed_views
        self.cache_half = cache_half
        self.seed = seed
        self._losses: list[DistillationLoss] = [SoftTargets()] if losses is None else list(losses)
        self._sources = [as_source(one) for one in (teacher if isinstance(teacher, list) else [teacher])]
        check_arguments(self._losses, self._sources, teacher_weights, cache, balance_every, stop)
        check_exits(self._losses, self._sources, teacher_output)
        self._schedules: list[Schedule] = []
        self._end = 1.0
        self._watch: StudentHook | None = None
        self._distiller: Distiller | None = None
        self._wrappings: list[Wrapping] = []
        self._projectors: Projectors | None = None
        self._average_model: nn.Module | None = None  # the name by which surgery finds averaged copies
        self._batch: Any = None
        self._begun = False
        self._scalars: dict[str, Tensor] = {}

    # Lightning's hooks, in the order a run meets them.

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Resolve the schedules, so that what cannot work is said before anything is trained."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._schedules = [resolve(loss.schedule, trainer.max_epochs) for loss in self._losses]
            self._end = end_of(self.stop, trainer.max_epochs)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the teachers, and give the optimizer the projectors that its stored state belongs to."""
        resuming = bool(trainer._checkpoint_connector._loaded_checkpoint)
        if self._projectors is not None:
            discard(self._projectors, trainer.optimizers)  # of an earlier fit with the same optimizers
        state = self.state(pl_module)
        if not resuming:
            state.clear()
        base = part_of(pl_module, self.student or "", f"KnowledgeDistillation(student={self.student!r})")
        like = next((p for p in base.parameters() if p.is_floating_point()), torch.empty(0, device=pl_module.device))
        self._projectors = Projectors(
            state.setdefault("projectors", {}), owner_of(base, trainer.optimizers), self.seed, like
        )
        super().on_fit_start(trainer, pl_module)
        teachers = [self._teacher(source, pl_module, like) for source in self._sources]
        for teacher in teachers:
            refuse_shared(teacher, trainer.optimizers)
        weights = self.teacher_weights or [1.0 / len(teachers)] * len(teachers)
        self._distiller = Distiller(
            base,
            f"{self.student}." if self.student else "",
            teachers,
            weights,
            self._losses,
            self._reading(),
            self._projectors,
            self._caches(trainer, state, teachers),
            state.setdefault("feature_layers", {}),
        )
        self._distiller.listen()
        self._watch = StudentHook(self.student if self.student is not None else state.get("student"))
        self._watch.listen(pl_module)
        self._wrap(trainer, pl_module)
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # what is compiled does not look for new hooks

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch for labels and masks."""
        self._batch = batch

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """DDP does not know the projectors: take the mean of their gradients, before they are unscaled or clipped."""
        assert self._projectors is not None  # made in `on_fit_start`
        accumulating = pl_module.automatic_optimization and trainer.fit_loop._should_accumulate()
        if trainer.world_size > 1 and not accumulating:
            for parameter in self._projectors.parameters():
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = reduce_mean(trainer, gradient)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw the curves."""
        scalars, self._scalars, self._batch = self._scalars, {}, None
        if scalars:
            values = {f"{self.method}/{name}": float(value) for name, value in scalars.items()}
            for logger in trainer.loggers:
                logger.log_metrics(values, step=steps_done(trainer))

    @override
    def on_surgery(
        self, trainer: Trainer, pl_module: LightningModule, kept: Mapping[str, Mapping[int, Tensor]] | None
    ) -> None:
        """Another method has changed the student: projectors follow, hooks move to the modules there are now."""
        if self._distiller is not None and self._watch is not None:
            self._distiller.follow(kept or {}, pl_module)
            self._distiller.listen(pl_module.get_submodule(self.student or ""))
            self._watch.listen(pl_module)
        if self._average_model is not None:
            self.state(pl_module)["self"] = {"weights": dict(self._average_model.state_dict())}

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so, if the teacher was never asked."""
        if not self.state(pl_module).get("asked", False):
            self._no_effect(
                f"no loss had a weight above 0 at any step: `stop={self.stop}`, weights "
                f"{[loss.weight for loss in self._losses]}."
            )

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lightning tears nothing down after an error."""
        self._release()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook, no wrapper and no teacher behind."""
        self._release()
        super().teardown(trainer, pl_module, stage)

    # Private: the small questions the hooks ask.

    def _release(self) -> None:
        for wrapping in self._wrappings:
            wrapping.undo()
        if self._watch is not None:
            self._watch.remove()
        if self._distiller is not None:
            self._distiller.release()
        self._wrappings, self._watch, self._distiller, self._average_model = [], None, None, None
        self._batch, self._scalars, self._begun = None, {}, False

    def _reading(self) -> Reading:
        return Reading(
            self.output,
            self.teacher_output,
            self.inputs,
            self.labels,
            self.mask,
            self.ignore_index,
            self.sample_index,
            self.fixed_views,
        )

    def _teacher(self, source: TeacherSource, pl_module: LightningModule, like: Tensor) -> Teacher:
        if isinstance(source, LiveTeacher):
            return InModelTeacher(source.path, pl_module, self.student or "")
        if not isinstance(source, SelfTeacher):
            with torch.random.fork_rng(devices=[]):  # to make a network draws random numbers: not those of the run
                return Teacher(source.build(), like)
        copied = copy_of_student(pl_module, self.state(pl_module), frozen=source.decay is None)
        part = copied.get_submodule(self.student or "")
        if source.decay is None:
            return Teacher(part, like)
        self._average_model = copied
        return Teacher(part, like, prefix=f"{self.student}." if self.student else "")

    def _caches(self, trainer: Trainer, state: dict[str, Any], teachers: Sequence[Teacher]) -> list[TeacherOutputCache]:
        if self.cache is None:
            return []
        rank = trainer.global_rank if trainer.world_size > 1 else None
        return caches_of(self.cache, self.cache_half, [teacher.root for teacher in teachers], state, rank)

    def _wrap(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = functools.partial(self._training_step, trainer, pl_module)
        self._wrappings = [Wrapping(pl_module, "training_step", step)]
        if not pl_module.automatic_optimization:
            backward = functools.partial(self._manual_backward, trainer, pl_module)
            self._wrappings.append(Wrapping(pl_module, "manual_backward", backward))

    def _training_step(
        self, trainer: Trainer, pl_module: LightningModule, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The user's ``training_step``, listened to; what it returns, with the distillation losses."""
        assert self._watch is not None
        assert self._distiller is not None
        self._follow_average(trainer, pl_module)
        shares = self._shares(trainer)
        on = any(shares)
        self._watch.on = on
        self._distiller.switch(on)
        try:
            output = original(*args, **kwargs)
        finally:
            self._watch.on = False
            self._distiller.switch(False)
        if not on or not pl_module.automatic_optimization:
            self._watch.called.clear()
            self._refuse_unasked(pl_module, on)
            return output
        loss = output["loss"] if isinstance(output, Mapping) else output
        extra = None if loss is None else self._extra(trainer, pl_module, loss, shares)
        if loss is not None:
            self._refuse_unasked(pl_module, on)
        return output if extra is None else add_to(output, extra)

    def _manual_backward(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        original: Callable[..., Any],
        loss: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """The first backward after a call of the student takes the distillation losses with it."""
        shares = self._shares(trainer)
        extra = self._extra(trainer, pl_module, loss, shares) if any(shares) else None
        original(loss if extra is None else loss + extra, *args, **kwargs)

    def _follow_average(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A moving average follows the last step; not before DDP has given all ranks the buffers of the first."""
        state = self.state(pl_module)
        if self._average_model is not None and state.get("averaged", 0) != steps_done(trainer):
            decay = next(s.decay for s in self._sources if isinstance(s, SelfTeacher) and s.decay is not None)
            move_towards(self._average_model, pl_module, 1.0 - decay)
            state["averaged"] = steps_done(trainer)

    def _shares(self, trainer: Trainer) -> list[float]:
        """Of each loss's weight, now; zeros when it is time to stop."""
        progress = training_progress(trainer)
        if progress >= self._end:
            return [0.0] * len(self._losses)
        pairs = zip(self._losses, self._schedules, strict=True)
        return [schedule(progress) if loss.weight else 0.0 for loss, schedule in pairs]

    def _extra(
        self, trainer: Trainer, pl_module: LightningModule, task: Tensor, shares: Sequence[float]
    ) -> Tensor | None:
        assert self._watch is not None
        assert self._distiller is not None
        call, state = self._watch.take(), self.state(pl_module)
        if call is None:
            return None
        if not self._begun:
            self._begin(trainer, state)
        unmatched = len(self._distiller.chosen)
        terms = self._distiller.compare(call, self._batch, shares)
        if len(self._distiller.chosen) > unmatched:
            log_rank_zero(trainer, f"{self.method}: feature_layers matched by resolution: {self._distiller.chosen}")
        factors = self._factors(trainer, state, task, terms)
        total = total_of(terms, factors)
        if self._is_logging(trainer):
            self._scalars = {"task_loss": task.detach(), **{term.name: term.value.detach() for term in terms}}
            self._scalars |= {name: torch.tensor(value) for name, value in self._distiller.agreement(call).items()}
        self._distiller.said.clear()
        return total

    def _begin(self, trainer: Trainer, state: dict[str, Any]) -> None:
        """The first call of this fit: now it is known which part of the module is the student."""
        assert self._watch is not None
        assert self._distiller is not None
        self._begun = True
        self._distiller.samples = samples_of(trainer)  # the data are loaded by now
        state |= {"asked": True, "student": self._watch.path}
        inner = (self._watch.path or "") if self.student is None else ""
        for source, teacher in zip(self._sources, self._distiller.teachers, strict=True):
            if isinstance(source, SelfTeacher):
                teacher.within(inner)

    def _factors(
        self, trainer: Trainer, state: dict[str, Any], task: Tensor, terms: Sequence[Term]
    ) -> list[float] | None:
        """What balances the losses, found anew every so many steps."""
        if not self.balance_every:
            return None
        assert self._distiller is not None
        known: dict[str, float] = state.setdefault("factors", {})
        if steps_done(trainer) % self.balance_every == 0 or any(term.name not in known for term in terms):
            learning = [p for p in self._distiller.student.parameters() if p.requires_grad]
            found = gradient_factors(task, [t.value for t in terms], learning, lambda mean: reduce_mean(trainer, mean))
            known.update(zip([term.name for term in terms], found.tolist(), strict=True))
        return [known[term.name] for term in terms]

    def _is_logging(self, trainer: Trainer) -> bool:
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # an attribute set by a connector
        return bool(trainer.loggers) and (steps_done(trainer) + 1) % every == 0

    def _refuse_unasked(self, pl_module: LightningModule, on: bool) -> None:
        if on and not self._begun:
            raise ValueError(
                f"`KnowledgeDistillation(student={self.student!r})`: expected `training_step` to call "
                f"`{type(pl_module).__name__}{f'.{self.student}' if self.student else ''}`, with gradients on, found "
                "that it does not. Name the module that it calls: `student='net'`."
            )
