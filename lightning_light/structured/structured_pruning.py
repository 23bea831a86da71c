"""`StructuredPruning`: remove channels while the network trains."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from torch import Tensor, nn
from typing_extensions import override

from lightning_light.batch_norm import has_statistics
from lightning_light.budgets import Budget
from lightning_light.capture import has_lazy_layers
from lightning_light.criteria import Criterion, EvidenceCollector, check_needs
from lightning_light.criteria.gathered import EvidenceStorage, Gathered
from lightning_light.criteria.learned_gates import GateProblem, GateTrainer, LearnedGates
from lightning_light.dependency import DependencyGraph, trace_calls
from lightning_light.dependency.trace import UNUSED
from lightning_light.errors import TraceError
from lightning_light.example_input import ExampleInput
from lightning_light.formatting import plural
from lightning_light.measure.latency_table import LatencyTable, measured_text
from lightning_light.order import DEFAULT_WINDOWS, Stage
from lightning_light.planning import criterion_for
from lightning_light.progress import training_progress
from lightning_light.recorded_inputs import RecordedState, ScheduledChanges
from lightning_light.schedules import Cubic, Schedule, Window, require_rising
from lightning_light.schema import Needs
from lightning_light.structured.costs import measure
from lightning_light.structured.functional import prune_channels
from lightning_light.structured.options import ChannelPruningOptions, Widths, check_gates, check_goal
from lightning_light.structured.plan import (
    Goal,
    Plan,
    check_prunable,
    check_run,
    gate_problem,
    plan_channels,
    widths_of,
)
from lightning_light.structured.ranking import Ranking
from lightning_light.structured.regularization import SparsityRegularizer, add_penalty
from lightning_light.structured.sensitivity import Sensitivity, curve_lines
from lightning_light.surgery.distributed import broadcast, log_rank_zero
from lightning_light.surgery.edit import cut
from lightning_light.surgery.stored_example import stored_calls
from lightning_light.targets import Targets, as_targets
from lightning_light.timing import Events
from lightning_light.training_step import callable_with
from lightning_light.validation import Fraction, NonNegativeInt, OpenFraction, PositiveInt, validated

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

__all__ = ["StructuredPruning"]


class _State(RecordedState, total=False):
    """What a checkpoint holds of a run.

    Attributes:
        events: number of cuts made or passed.
        fraction: of the way to the goal.
        removed: channels removed so far, in all fits.
        original: group name -> width before the first cut.
        planned: whether the run was checked.
        evidence: what the collector has gathered.
        curves: what `Sensitivity` has measured.
    """

    events: NonNegativeInt
    fraction: Fraction
    removed: NonNegativeInt
    original: dict[str, PositiveInt]
    planned: Annotated[bool, Needs("original")]
    evidence: EvidenceStorage
    curves: dict[str, Tensor]


@validated
@dataclass(eq=False, repr=False)
class StructuredPruning(ScheduledChanges):
    """Remove the least important channels, a few at a time, until the network meets ``budget``.

    When a channel is removed, the layer that computes it, every layer that reads it and the optimizer's state shrink
    in the same step, and training continues. Which channels are coupled is found by following each through ``forward``
    and through the training step of the first batch together, in isolation; the outputs of the network are never
    removed. The whole run is planned before the first training step: what cannot be reached is refused with the network
    unchanged.

    Fang et al., 2023, "DepGraph: Towards Any Structural Pruning". https://arxiv.org/abs/2301.12900

    Example:
        >>> from lightning_light.budgets import MACs
        >>> StructuredPruning(MACs(0.4), widths=Widths(round_to=8))
        StructuredPruning(budget=MACs(remaining=0.4), widths=Widths(round_to=8, min_channels=2, min_remaining=0.1))

    Args:
        budget: what the network is to reach: ``MACs``, ``Params``, ``Channels``, ``Size`` (of its tensors) or
            ``Latency`` (of a forward pass on the training device, or of the written file in a ``runtime``). None where
            ``remaining`` alone limits the widths.
        criterion: scores weights; the channels with the lowest scores are removed first.
        schedule: progress -> fraction of the way to the budget; it must not fall.
        every_n_steps: optimizer steps between two cuts inside the schedule's window; None for ten cuts.
        ranking: ``Global()``, ``Local()``, ``Isomorphic()`` or ``Sensitivity()``: which channels are compared with each
            other.
        targets: layers whose output channels may be removed: patterns or `Targets`.
        remaining: layer pattern -> fraction of the layer's channels, in (0, 1], that stays at the end; such layers are
            not ranked.
        widths: bounds on the number of channels that layers keep.
        heads: what is removed from an attention layer: ``"dim"``, the same positions of every head, or ``"head"``,
            whole heads.
        calibration_batches: optimizer steps before a cut over which a data-dependent criterion gathers evidence, and
            batches before the last cut from which batch-norm statistics are corrected.
        correct_batch_norm: after the last cut, move the batch-norm statistics by what the cut did to them.
        regularizer: a penalty on whole channels until the last cut, `GroupLasso` or `GrowingRegularization`.
        dry_run: remove nothing, and log at each cut what one cut to that point of the schedule would remove, with the
            reason for each layer that is kept.

    Raises:
        TypeError: an argument has the wrong type; at construction.
        ValueError: an argument is out of range, or the schedule falls; at construction.
        BudgetError: the budget cannot be reached; before the first training step.
        TargetError: ``targets`` or ``remaining`` match no layer.
        TraceError: the training step does not run in isolation, and ``forward`` does not show all that it reads; or the
            network does not run on the example input.
        UnsupportedError: a strategy, launcher or optimizer whose state cannot follow, or a layer that a later method
            has changed.

    Note:
        Masks, factors and quantization come after it; on their layers it is refused.
    """

    method: ClassVar[str] = "structured_pruning"
    function: ClassVar[str] = "lightning_light.prune_channels"
    requires_calls: ClassVar[bool] = False
    stage: ClassVar[int] = Stage.STRUCTURED
    state_schema: ClassVar[Any] = _State

    budget: Budget | None = None
    _: KW_ONLY
    criterion: Criterion = ChannelPruningOptions.criterion
    schedule: Schedule = Window(Cubic(), *DEFAULT_WINDOWS[Stage.STRUCTURED])
    every_n_steps: PositiveInt | None = None
    ranking: Ranking = ChannelPruningOptions.ranking
    targets: Targets | str | list[str] | None = ChannelPruningOptions.targets
    remaining: dict[str, OpenFraction] | None = ChannelPruningOptions.remaining
    widths: Widths = ChannelPruningOptions.widths
    heads: Literal["dim", "head"] = ChannelPruningOptions.heads
    calibration_batches: PositiveInt = ChannelPruningOptions.calibration_batches
    correct_batch_norm: bool = ChannelPruningOptions.correct_batch_norm
    regularizer: SparsityRegularizer | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        check_goal("StructuredPruning", self.budget, self.remaining)
        check_needs("StructuredPruning", self.criterion, scores_groups=True)
        require_rising("StructuredPruning", self.schedule)
        self.options = self.options_as(ChannelPruningOptions)
        check_gates("StructuredPruning", self.options)
        self._events = Events(self.schedule, self.every_n_steps)
        self._corrects = False
        self._graph: DependencyGraph | None = None
        self._calls: list[ExampleInput] = []
        self._batch: Any = None
        self._last_plan: Plan | None = None

    # Lightning's hooks, in the order a run meets them.

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the layers as they are now, also those made in ``configure_model``, and plan the run if possible."""
        super().on_fit_start(trainer, pl_module)
        check_prunable(pl_module)
        for pattern in (self.targets, *(self.remaining or {})):
            as_targets(pattern).select(pl_module)
        self._graph, self._calls = None, []
        self._corrects = self.correct_batch_norm and not self.dry_run and has_statistics(pl_module)
        recorded = self._corrects or isinstance(self.ranking, Sensitivity)
        of_this_fit = self.state(pl_module).keys() - {"original", "removed"}  # widths are relative to the first network
        self.record_inputs(pl_module, *of_this_fit, recorded=recorded)
        if self._needs_data:
            self._collector = self._new_collector(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Make the cut that is due: before the batch, so that no checkpoint pairs new weights with an old metric."""
        state = self.state(pl_module)
        self._batch = None if self._calls else batch
        if not has_lazy_layers(pl_module):
            self._plan_run(trainer, pl_module)
        due = self._due(trainer)
        if due > state.get("events", 0) and self._is_ready(pl_module):
            self._cut(trainer, pl_module, due)
        if self._collector is not None:
            self._collector.begin_batch(gather=self._is_near(trainer, state.get("events", 0), self._criterion_batches))
        if self.recorder is not None:
            self.recorder.active = self._uses_inputs(trainer, state)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Plan the run, if layers had no shape before; read the gradients, then add the penalty to them."""
        self._plan_run(trainer, pl_module)
        if self._collector is not None:
            self._collector.observe_step(p for group in optimizer.param_groups for p in group["params"])
        finished = self.dry_run or self.state(pl_module).get("events", 0) >= len(self._points)
        if self.regularizer is not None and self.has_example(pl_module) and not finished:
            graph = self._trace(trainer, pl_module, self.example(pl_module))
            groups = [group for group in graph.groups if group.reason is None]
            phase = min(training_progress(trainer) / max(self._points[-1][0], 1e-9), 1.0)
            add_penalty(pl_module, groups, self.regularizer, phase)

    @override
    def before_surgery(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the unchanged network before another method changes it."""
        if not has_lazy_layers(pl_module):
            self._plan_run(trainer, pl_module)

    @override
    def on_surgery(
        self, trainer: Trainer, pl_module: LightningModule, kept: Mapping[str, Mapping[int, Tensor]] | None
    ) -> None:
        """Let the evidence follow a change of structure."""
        if self._collector is not None:
            self._collector.follow(kept)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove all hooks, and the references to the network."""
        self._graph, self._batch, self._calls = None, None, []
        super().teardown(trainer, pl_module, stage)

    @override
    def rehearse(self, model: nn.Module, example: ExampleInput, batches: Sequence[Any]) -> list[str]:
        """Make one cut that meets the budget."""
        criterion, note = criterion_for(model, self.criterion, batches)
        given = {**vars(self.options), "criterion": criterion, "data": list(batches) or [example]}
        return note + prune_channels(model, example, self.budget, **given).lines()

    # Private: when.

    def _is_ready(self, pl_module: LightningModule) -> bool:
        """Whether the run is planned, and what criterion and ranking need has been gathered."""
        state = self.state(pl_module)
        if not self._calls or not state.get("planned"):
            return False
        measured = True
        if isinstance(self.ranking, Sensitivity) and self.has_example(pl_module):
            of_step = self.example(pl_module).method != "forward"
            measured = of_step or "curves" in state or len(state.get("inputs", [])) >= self.ranking.batches
        return measured and (self._collector is None or self._collector.batches >= self._criterion_batches)

    @property
    def _needs_data(self) -> bool:
        return bool(self.criterion.needs - {"generator"})

    @property
    def _criterion_batches(self) -> int:
        """The number of batches that the criterion uses before a cut."""
        return self.criterion.steps if isinstance(self.criterion, LearnedGates) else self.calibration_batches

    @property
    @override
    def recorded_batches(self) -> int:
        measured = self.ranking.batches if isinstance(self.ranking, Sensitivity) else 0
        return max(measured, self.calibration_batches)

    def _uses_inputs(self, trainer: Trainer, state: Mapping[str, Any]) -> bool:
        """Whether the inputs of this batch are for the curves of `Sensitivity` or for batch-norm statistics."""
        last, steps = len(self._points) - 1, self.recorded_batches
        measures = isinstance(self.ranking, Sensitivity) and "curves" not in state and self._is_near(trainer, 0, steps)
        return measures or (
            self._corrects and state.get("events", 0) <= last and self._is_near(trainer, last, self.calibration_batches)
        )

    # Private: what.

    def _plan_run(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check, once per fit and on the first batch, that the last cut can be made.

        Where another method changes the network before that, it is measured by its forward pass.
        """
        state = self.state(pl_module)
        if self._batch is not None:
            self._calls, self._batch, self._graph = self._observe(trainer, pl_module, self._batch), None, None
        if state.get("planned") or not self.has_example(pl_module):
            return
        example = self.example(pl_module)
        graph = self._trace(trainer, pl_module, example)
        state["original"] = widths_of(graph) | state.get("original", {})
        with callable_with(pl_module, example):
            goal = self._goal(trainer, pl_module, example, fraction=1.0)
            if self._calls:
                check = partial(check_run, pl_module, graph, self.options)
                self.decided(trainer, pl_module, self.budget, lambda table: check(replace(goal, table=table)))
                state["planned"] = True

    def _observe(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> list[ExampleInput]:
        """Return the calls whose channels are followed: of ``forward``, the training step, the validation step.

        Raises:
            TraceError: the training step may read more than ``forward`` shows, and does not run in a trace.
        """
        assert self.captured is not None
        calls, found = self.captured.calls(pl_module, batch), self.captured.observed
        assert found is not None
        if found.step is not None:
            return calls
        name = f"{type(pl_module).__name__}.training_step"
        if calls and found.only_forward:  # `forward` may show all that the step reads
            graph = trace_calls(pl_module, [self.example(pl_module)], heads=self.heads)
            if not any(group.reason == UNUSED for group in graph.groups):
                reason = f"`{name}` does not run in a trace: {found.error}"
                log_rank_zero(trainer, f"{self.method}: channels are followed through `forward` alone: {reason}")
                return calls
        raise TraceError(
            f"`{name}` does not run in a trace of the first batch: {found.error}. Expected a step that runs without "
            "gradients, optimizers and logging: what it reads of a channel has to be known before that is removed. Let "
            "it run under `torch.no_grad()`; or let all layers run in `forward`, call nothing but `self(...)`, and set "
            "`self.example_input_array = ...` in the module."
        )

    def _goal(self, trainer: Trainer, pl_module: LightningModule, example: ExampleInput, fraction: float) -> Goal:
        state, graph, budget = self.state(pl_module), self._trace(trainer, pl_module, example), self.budget
        dense, known = 0.0, self.compression_state(pl_module)
        if budget is not None:
            now = partial(measure, pl_module, budget, example, graph)
            dense = known.reference(budget.quantity, lambda: self.decided(trainer, pl_module, budget, now))
        original, seed = widths_of(graph, state["original"]), state.get("events", 0)
        table = LatencyTable.of(budget, state.get("latency"))
        goal = Goal(budget, example, original, dense, fraction, seed, table=table)
        if isinstance(self.ranking, Sensitivity):
            calls = stored_calls(pl_module, state)
            goal = replace(goal, calls=calls[-self.ranking.batches :], curves=state.get("curves", {}))
        return goal

    def _new_collector(self, trainer: Trainer, pl_module: LightningModule) -> EvidenceCollector | GateTrainer:
        """What gathers the evidence; a function gives it its storage, since loading a checkpoint replaces the state."""

        def storage() -> Any:
            return self.state(pl_module).setdefault("evidence", {})

        if isinstance(self.criterion, LearnedGates):
            return GateTrainer(pl_module, self.criterion, storage, lambda: self._gate_problem(trainer, pl_module))
        return EvidenceCollector.for_criterion(pl_module, None, self.criterion, storage)

    def _gate_problem(self, trainer: Trainer, pl_module: LightningModule) -> GateProblem:
        """What the gates of the next cut are trained for: the same on every rank."""
        self._plan_run(trainer, pl_module)
        example, event = self.example(pl_module), self.state(pl_module).get("events", 0)
        goal = self._goal(trainer, pl_module, example, self._points[event][1])
        problem = gate_problem(pl_module, self._trace(trainer, pl_module, example), self.options, goal)
        return replace(problem, goal=broadcast(trainer, problem.goal))

    def _trace(self, trainer: Trainer, pl_module: LightningModule, example: ExampleInput) -> DependencyGraph:
        """Trace the dependencies once, and again where another method has changed the network; rank 0 decides."""
        if self._graph is None or not self._graph.fits(pl_module):
            calls = [call.to(pl_module) for call in self._calls or [example]]
            self._graph = broadcast(trainer, trace_calls(pl_module, calls, heads=self.heads))
        return self._graph

    def _cut(self, trainer: Trainer, pl_module: LightningModule, due: int) -> None:
        """Make one cut: decided on rank 0, carried out on every rank, followed by all that refers to the network."""
        example, state = self.example(pl_module), self.state(pl_module)
        graph, fraction = self._trace(trainer, pl_module, example), self._points[due - 1][1]
        with callable_with(pl_module, example):
            goal = self._goal(trainer, pl_module, example, fraction)
            plan = self._decide(trainer, pl_module, graph, goal)
        self._last_plan = plan
        if self.dry_run:
            log_rank_zero(trainer, "\n  ".join([f"{self.method}: dry run, nothing is removed", *plan.lines()]))
        elif plan.removed:
            self._carry_out(trainer, pl_module, plan, _summary(plan, goal), due)
        state |= {"events": due, "fraction": fraction}
        if plan.curves and "curves" not in state:
            log_rank_zero(trainer, "\n  ".join([f"{self.method}: sensitivity", *curve_lines(plan.curves)]))
            state["curves"] = dict(plan.curves)
        if due == len(self._points):
            state.pop("inputs", None)
        if self._collector is not None:
            self._collector.forget()
        cost = {} if self.budget is None else {self.budget.quantity: plan.after}
        self.log_scalars(trainer, {"fraction": fraction, "channels_removed": float(plan.removed), **cost})

    def _decide(self, trainer: Trainer, pl_module: LightningModule, graph: DependencyGraph, goal: Goal) -> Plan:
        """Return the plan of rank 0, on every rank, or raise its error on every rank."""
        gathered = self._collector.means() if self._collector is not None else Gathered()

        def decide(table: LatencyTable | None) -> Plan:
            return plan_channels(pl_module, graph, self.options, replace(goal, table=table), gathered)

        return self.decided(trainer, pl_module, self.budget, decide)

    def _carry_out(self, trainer: Trainer, pl_module: LightningModule, plan: Plan, summary: str, due: int) -> None:
        """Cut the network and everything that follows it; after the last cut, correct the batch-norm statistics."""
        assert self._graph is not None
        part, last = f"{due}/{len(self._points)}", due == len(self._points)
        state, graph = self.state(pl_module), self._graph
        kept, attributes = graph.kept_positions(plan.kept), graph.attributes(pl_module, plan.kept)
        calls = stored_calls(pl_module, state) if last and self._corrects else []
        apply = partial(cut, pl_module, kept, attributes=attributes)
        edit = self.change(trainer, pl_module, apply, calls, kept=lambda _: kept)
        state["removed"] = state.get("removed", 0) + plan.removed
        self._graph = graph.after_pruning(plan.kept)
        self._after_surgery(trainer, pl_module, edit.entry(), summary, part=part, kept=kept)
        log_rank_zero(trainer, "\n  ".join([f"{self.method}: {summary}", *plan.lines()]), level=logging.DEBUG)

    @override
    def _no_effect_reason(self, pl_module: LightningModule) -> str | None:
        if self.dry_run or self.state(pl_module).get("removed"):
            return None
        if self._last_plan is None:
            reads = f" `{self.criterion!r}` reads {self._criterion_batches} batches before." if self._needs_data else ""
            return (
                f"the run ended before the first cut; `schedule={self.schedule!r}` has cuts at {self._points}.{reads}"
            )
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self._last_plan.skipped.items())
        if self._last_plan.kept:
            return f"the network meets the budget as it is: {self.budget!r}. {reasons}"
        return f"no layer may lose channels. {reasons}"


def _summary(plan: Plan, goal: Goal) -> str:
    reached = "" if goal.budget is None else f"{type(goal.budget).__name__} {100 * plan.after / goal.dense:.0f} %, "
    reached += measured_text(plan.after, plan.estimated)
    layers = len(plan.cuts())
    return f"{reached}{plural(plan.removed, 'channel')} removed from {plural(layers, 'layer')}"
