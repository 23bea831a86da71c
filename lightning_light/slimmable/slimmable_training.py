"""`SlimmableTraining`: train one network at several widths."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypedDict

from torch import Tensor, nn
from typing_extensions import override

from lightning_light.capture import capture, has_lazy_layers
from lightning_light.criteria.evidence import Criterion
from lightning_light.criteria.group_criterion import check_needs
from lightning_light.dependency import trace_calls, trace_dependencies
from lightning_light.distillation.added_loss import AddedLoss
from lightning_light.distillation.agreement import Agreement
from lightning_light.distillation.feature_layers import module_at
from lightning_light.distillation.loss import DistillationLoss
from lightning_light.distillation.losses import SoftTargets
from lightning_light.distillation.student_hook import ForwardCall, StudentHook
from lightning_light.errors import UnsupportedError
from lightning_light.example_input import ExampleInput
from lightning_light.host.patches import InstancePatch, wrap_method
from lightning_light.progress import epochs_planned, training_progress
from lightning_light.schedules import resolve, resolve_moment
from lightning_light.schema import LayerName, Length, Needs
from lightning_light.selectors import Selector, select
from lightning_light.slimmable.networks import NarrowNetwork, PlainNetwork
from lightning_light.slimmable.plan import METHOD, STAGE, WidthOptions, WidthPlan, plan_widths
from lightning_light.structured.options import ChannelPruningOptions
from lightning_light.structured.plan import check_prunable
from lightning_light.surgery.distributed import log_rank_zero, on_rank_zero
from lightning_light.targets import Targets, as_targets
from lightning_light.training_step import callable_with, overrides
from lightning_light.validation import Moment, NonNegativeInt, OpenFraction, PositiveInt, validated

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["SlimmableTraining"]


class _State(TypedDict, total=False):
    """What a checkpoint holds.

    Attributes:
        widths: below 1.
        networks: the narrower network of each width, and its batch-norm statistics.
        part: path of the module that is narrowed.
        steps: number of training steps with narrower networks, from which the random widths are drawn.
    """

    widths: list[OpenFraction]
    networks: Annotated[list[PlainNetwork], Needs("widths", "part", "steps"), Length("widths")]
    part: Annotated[str, LayerName()]
    steps: NonNegativeInt


@validated
@dataclass(eq=False, repr=False)
class SlimmableTraining(AddedLoss):
    """Train one network that runs at several widths: each is a part of its channels.

    In each training step the whole network is trained by the user's own loss. The smallest width and ``random_widths``
    others (sandwich rule) are called with the same inputs, and learn the outputs of the whole network (in-place
    distillation); their losses are added to the user's. The channels of a narrower network are among those of a wider
    one. All widths share the parameters; each has batch-norm statistics of its own. Take one of them out by
    `extract_width`.

    Yu et al., 2019, "Slimmable Neural Networks". https://arxiv.org/abs/1812.08928. Yu & Huang, 2019, "Universally
    Slimmable Networks and Improved Training Techniques". https://arxiv.org/abs/1903.05134. There the first channels of
    each layer are kept, here those that a criterion scores highest when the training of the widths begins; the second
    paper measures the statistics after the training, here they are kept during it.

    Example:
        >>> SlimmableTraining((1.0, 0.5), start=0.2)
        SlimmableTraining(widths=(1.0, 0.5), start=0.2)

    Args:
        widths: fractions of the channels of each layer, in (0, 1]; 1.0 is one of them.
        random_widths: how many widths between the smallest and the whole are trained in each step.
        loss: compares the output of a narrower network with that of the whole one, which is constant. For outputs that
            are no class scores give ``OutputRegression()``.
        output: which part of the output is compared: a key or attribute, a position, or a function.
        network: path of the module that is narrowed; None for what ``training_step`` calls: the LightningModule
            itself, or one part of it.
        start: epoch (int) or fraction of the run (float) from which on several widths are trained.
        criterion: scores weights when the training of the widths begins; a narrower network keeps the channels with the
            highest scores. One that reads weights alone.
        targets: layers whose output channels may be left out: patterns or `Targets`.
        round_to: numbers of channels are multiples of it.
        heads: what is left out of an attention layer: ``"dim"``, the same positions of every head, or ``"head"``, whole
            heads.
        seed: of the random widths.

    Raises:
        TypeError: an argument has the wrong type; at construction.
        ValueError: an argument is out of range; at construction.
        TargetError: ``targets`` or ``network`` match nothing.
        UnsupportedError: no layer can be narrowed, the training step does not run in isolation, or a method that
            changes layers is in the same run; before the first optimizer step.

    Note:
        Validation logs ``slimmable_training/agreement_0.5`` for each width: the share of predictions that are those of
        the whole network, or the loss where outputs are no class scores. The graphs of all widths of a step are in
        memory at once.
    """

    method: ClassVar[str] = METHOD
    stage: ClassVar[int] = STAGE
    structural: ClassVar[bool] = False
    whole_parameters: ClassVar[tuple[str, str] | None] = (
        "the narrower networks are slices of them",
        "Train on one device or with `strategy='ddp'`.",
    )
    state_schema: ClassVar[Any] = _State

    widths: tuple[OpenFraction, ...] | list[OpenFraction] = (1.0, 0.75, 0.5, 0.25)
    _: KW_ONLY
    random_widths: NonNegativeInt = 1
    loss: DistillationLoss = SoftTargets(temperature=1.0)  # noqa: RUF009  # frozen
    output: Selector = None
    network: str | None = None
    start: Moment = 0.0
    criterion: Criterion = ChannelPruningOptions.criterion
    targets: Targets | str | list[str] | None = ChannelPruningOptions.targets
    round_to: PositiveInt = 1
    heads: Literal["dim", "head"] = ChannelPruningOptions.heads
    seed: int = 0

    def __post_init__(self) -> None:
        _check_widths(self.widths)
        _check_loss(self.loss)
        check_needs("SlimmableTraining", self.criterion, frozenset(), scores_groups=True)
        self._options = WidthOptions(self.widths, self.criterion, self.targets, self.round_to)
        self._agreement = Agreement(None, [self.loss])
        self._calls: list[ExampleInput] = []
        self._example: ExampleInput | None = None
        self._part = ""
        self._networks: dict[float, NarrowNetwork] = {}
        self._plain: Any = None  # the state that they belong to
        self._hooks: Sequence[StudentHook] = ()
        self._patches: list[InstancePatch] = []

    # Lightning's hooks, in the order a run meets them.

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Resolve moments, and refuse a second callback of the kind."""
        super().setup(trainer, pl_module, stage)
        if self._key != self.method:
            raise UnsupportedError(
                "`callbacks=[SlimmableTraining(...), SlimmableTraining(...)]`: expected one of them, found two. Give "
                "all widths to one."
            )
        if stage == "fit":
            self._schedule = resolve(self.loss.schedule, epochs_planned(trainer))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the layers and the widths of an earlier fit."""
        super().on_fit_start(trainer, pl_module)
        check_prunable(pl_module)
        as_targets(self.targets).select(pl_module)
        module_at(pl_module, self.network or "", f"SlimmableTraining(network={self.network!r})")
        widths = self.state(pl_module).get("widths", self._options.narrower)
        if widths != self._options.narrower:
            raise UnsupportedError(
                f"`SlimmableTraining(widths={list(self.widths)})`: expected the widths that this network was trained "
                f"with, found {[1.0, *widths]}. Give these, or begin with a new network."
            )
        self._calls = []

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Plan the widths on the first batch; at ``start`` begin to train them."""
        state = self.state(pl_module)
        if (self._networks and state.get("networks") is self._plain) or has_lazy_layers(pl_module):
            return
        if "networks" not in state:
            begins, first = training_progress(trainer) >= self._moment(epochs_planned(trainer)), not self._calls
            if first:
                self._observe(pl_module, batch)
            plan = on_rank_zero(trainer, lambda: self._plan(pl_module)) if first or begins else None
            if plan is None or not begins:
                return
            self.claim(pl_module, plan.layers)
            state |= {"widths": list(plan.networks), "networks": list(plan.networks.values())}
            state |= {"part": self._part, "steps": 0}
            self.log_event(trainer, pl_module, plan.shares())
            log_rank_zero(trainer, "\n  ".join([f"{self.method}: channels of each width", *plan.lines]))
        self._undo()  # where a checkpoint was loaded since, as by Lightning's learning-rate finder
        self._begin(trainer, pl_module, state)

    @override
    def _no_effect_reason(self, pl_module: LightningModule) -> str | None:
        return None if self.state(pl_module).get("steps") else f"the run ended before `start={self.start}`."

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Undo patches and remove hooks."""
        self._undo()
        self._networks, self._plain, self._calls, self._example = {}, None, [], None
        super().teardown(trainer, pl_module, stage)

    @override
    def window(self, max_epochs: int | None) -> tuple[float, float] | None:
        """From ``start`` to the end: what changes layers comes before, or after a width is taken out."""
        return self._moment(max_epochs), 1.0

    @override
    def last_change(self, max_epochs: int | None) -> float | None:
        return self._moment(max_epochs)

    @override
    def rehearse(self, model: nn.Module, example: ExampleInput, batches: Sequence[Any]) -> list[str]:
        """Choose the channels of all widths; the network stays whole."""
        graph = trace_dependencies(model, example.args, example.kwargs, heads=self.heads)
        return plan_widths(model, graph, example, self._options, self.network or "").lines

    # Private: which channels.

    def _moment(self, max_epochs: int | None) -> float:
        return resolve_moment(self.start, max_epochs, f"SlimmableTraining(start={self.start})")

    def _observe(self, pl_module: LightningModule, batch: Any) -> None:
        """Find the calls whose channels are followed, and the module that the training step calls."""
        captured = capture(pl_module)
        self._calls, found = captured.calls(pl_module, batch), captured.observed
        assert found is not None
        name = f"{type(pl_module).__name__}.training_step"
        if found.step is None:
            raise UnsupportedError(
                f"`SlimmableTraining()` on `{name}`: expected a step that runs in a trace of the first batch, without "
                f"gradients, optimizers and logging, found one that does not: {found.error}. Let it run under "
                "`torch.no_grad()`."
            )
        called = [""] if "" in found.called else found.called
        if self.network is None and len(called) != 1:
            raise UnsupportedError(
                f"`SlimmableTraining(network=None)` on `{name}`: expected a step that calls `self(...)` or one part of "
                f"the module, found calls of {', '.join(map(repr, called)) or 'none'}. Name the part to be narrowed: "
                "`network='...'`."
            )
        self._part = called[0] if self.network is None else self.network
        self._example = captured.example

    def _plan(self, pl_module: LightningModule) -> WidthPlan:
        assert self._example is not None  # of a step that runs
        graph = trace_calls(pl_module, [call.to(pl_module) for call in self._calls], heads=self.heads)
        example = self._example.to(pl_module)
        with callable_with(pl_module, example):
            return plan_widths(pl_module, graph, example, self._options, self._part)

    # Private: one step.

    def _begin(self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any]) -> None:
        """Patch the steps. After the other methods, so that the losses of the widths come last."""
        self._part, self._plain = state["part"], state["networks"]
        networks = (NarrowNetwork(pl_module, plain, self._part) for plain in self._plain)
        self._networks = dict(zip(state["widths"], networks, strict=True))
        self._hooks = self.student_hook, validation = StudentHook(self._part), StudentHook(self._part, gradients=False)
        for hook in self._hooks:
            hook.register(pl_module)
        self._patches = self.patch_steps(trainer, pl_module)
        if overrides(pl_module, "validation_step"):
            step = functools.partial(self._validation_step, pl_module, validation)
            self._patches.append(wrap_method(pl_module, "validation_step", step))

    def _undo(self) -> None:
        for patch in self._patches:
            patch.undo()
        for hook in self._hooks:
            hook.remove()
        self._patches, self._hooks = [], ()

    @override
    def added_loss(self, trainer: Trainer, pl_module: LightningModule, task: Tensor) -> Tensor | None:
        call = self.student_hook.pop()
        if call is None:
            return None
        state = self.state(pl_module)
        total = sum(
            (self.loss(*self._outputs(width, call)) for width in self._drawn(state["steps"])), task.new_zeros(())
        )
        state["steps"] += 1
        return self.loss.weight * self._schedule(training_progress(trainer)) * total

    @override
    def check_called(self, pl_module: LightningModule) -> None:
        if not self.state(pl_module)["steps"]:
            raise UnsupportedError(
                f"`SlimmableTraining(network={self.network!r})`: expected `training_step` to call "
                f"`{type(pl_module).__name__}{f'.{self._part}' if self._part else ''}`, with gradients on, found that "
                "it does not. Name the module that it calls."
            )

    def _drawn(self, step: int) -> list[float]:
        """Return the smallest width and random others: the same on every rank, and in a resumed run."""
        *between, smallest = self._options.narrower
        count = min(self.random_widths, len(between))
        return [smallest, *random.Random(f"{self.seed} {step}").sample(between, count)]

    def _outputs(self, width: float, call: ForwardCall) -> tuple[Tensor, Tensor]:
        """Return what is compared: the output of a width, and that of the whole network, which is constant."""
        name = f"SlimmableTraining(output={self.output!r})"
        whole = select(call.output, self.output, name).detach()
        if isinstance(self.loss, SoftTargets) and whole.shape[self.loss.class_dim] < 2:
            raise ValueError(
                f"`SlimmableTraining(loss={self.loss!r})`: expected outputs that are scores of two or more classes, "
                f"found the shape {tuple(whole.shape)}. For other outputs give `loss=OutputRegression()`."
            )
        return select(self._networks[width](*call.args, **call.kwargs), self.output, name), whole

    def _validation_step(
        self, pl_module: LightningModule, hook: StudentHook, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run the user's ``validation_step``, and log how well the outputs of each width agree with the whole."""
        hook.enabled = True
        try:
            result = original(*args, **kwargs)
        finally:
            hook.enabled = False
        call = hook.pop()
        if call is None:
            return result
        for width in self._networks:
            narrow, whole = self._outputs(width, call)
            values = self._agreement.values(narrow, whole, None) or {self.loss.name: float(self.loss(narrow, whole))}
            named = {f"{self.method}/{name}_{width:g}": value for name, value in values.items()}
            pl_module.log_dict(named, batch_size=len(whole), sync_dist=True)
        return result


def _check_widths(widths: Sequence[float]) -> None:
    if 1.0 not in widths or len(widths) < 2 or len(set(widths)) < len(widths):
        found = "duplicates" if len(set(widths)) < len(widths) else "no 1.0" if 1.0 not in widths else "1.0 alone"
        raise ValueError(
            f"`SlimmableTraining(widths={list(widths)})`: expected different fractions in (0, 1], 1.0 and smaller "
            f"ones, found {found}. Write for instance `widths=(1.0, 0.5)`."
        )


def _check_loss(loss: DistillationLoss) -> None:
    if loss.needs_labels or not loss.compares_outputs:
        raise UnsupportedError(
            f"`SlimmableTraining(loss={loss!r})`: expected a loss over the outputs of two networks, found one that "
            f"reads {'labels' if loss.needs_labels else 'features'}. Use `SoftTargets()` or `OutputRegression()`."
        )
