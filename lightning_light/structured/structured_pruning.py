"""`StructuredPruning`: channels leave while the network trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from typing_extensions import override

from lightning_light.budgets import Budget
from lightning_light.callback import CompressionCallback
from lightning_light.criteria.evidence import Criterion
from lightning_light.criteria.magnitude import Magnitude
from lightning_light.criteria.reduction import Normalizer, Reduction, check_names
from lightning_light.dependency import ChannelGroup, DependencyGraph, trace_dependencies
from lightning_light.errors import LightningLightError
from lightning_light.events import event_points, points_done
from lightning_light.example_input import Capture, ExampleInput
from lightning_light.order import Stage
from lightning_light.progress import steps_done, steps_planned, training_progress
from lightning_light.schedules import Cubic, Schedule, Window, resolve
from lightning_light.structured import batch_norm
from lightning_light.structured.checks import check_arguments, refuse_unprunable
from lightning_light.structured.costs import quantity
from lightning_light.structured.gather import ActivationWatch, add_gradients, mean_evidence
from lightning_light.structured.plan import Options, Plan, plan_channels
from lightning_light.structured.ranking import Global, Ranking
from lightning_light.structured.regularization import SparsityRegularizer, add_penalty
from lightning_light.surgery.averaged_models import averaged_models_of
from lightning_light.surgery.distributed import broadcast, log_rank_zero, reduce_mean
from lightning_light.surgery.edit import cut
from lightning_light.surgery.stored_example import remember, restore_or_capture_example
from lightning_light.targets import Targets, as_targets

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

__all__ = ["StructuredPruning"]


class StructuredPruning(CompressionCallback):
    """Remove the least important channels, a few at a time, until the network fits ``budget``.

    A removed channel is gone: its layer, every layer that reads it and the optimizer's state shrink in the same step,
    and training goes on. Which channels hang together is found by following each through one forward pass; the
    network's outputs are never touched.

    Fang et al., 2023, "DepGraph: Towards Any Structural Pruning". https://arxiv.org/abs/2301.12900

    Example:
        >>> from lightning_light import Cubic, MACs, StructuredPruning, Window
        >>> StructuredPruning(MACs(0.4), round_to=8)
        StructuredPruning(budget=MACs(remaining=0.4), round_to=8)

    Args:
        budget: what the network is to reach: ``MACs``, ``Params``, ``Channels``, ``Size`` (of its tensors) or
            ``Latency`` (of a forward pass on the training device). None where ``amounts`` say it all.
        criterion: scores weights; the channels with the lowest scores go first.
        schedule: progress -> share of the way to the budget. Epochs and fractions as in `Window`.
        ranking: ``Local()``, ``Global()`` or ``Isomorphic()``: among which channels the lowest is looked for.
        targets: layers whose output channels may leave: patterns or `Targets`.
        amounts: layer pattern -> share of its channels, in [0, 1), that leaves in the end; overrides the ranking there.
        round_to: widths stay multiples of it (8 suits most hardware); 1 for any width.
        min_channels: what every layer keeps at least.
        max_amount: no layer loses more than this share of its channels, in [0, 1].
        events: how many cuts a gradual schedule is taken in.
        heads: what leaves an attention: ``"dim"``, the same positions of every head, or ``"head"``, whole heads.
        reduction: how the scores of coupled layers become one.
        normalizer: how the scores of different layers are made comparable.
        calibration_batches: optimizer steps before a cut over which a data-dependent criterion gathers.
        regularizer: a penalty on whole channels until the last cut, `GroupLasso` or `GrowingRegularization`.
        reestimate_batch_norm: training batches after the last cut over which batch-norm statistics are averaged anew;
            0 for not at all.
        dry_run: log what the first cut would do, and do nothing.

    Raises:
        ValueError: an argument out of range; said at once.
        BudgetError: the budget cannot be reached; said before the first cut changes anything.
        TargetError: ``targets`` or ``amounts`` name nothing.
        TraceError: the network does not run on the example input.
        UnsupportedError: a strategy, launcher or optimizer whose state cannot follow.

    Note:
        Masks, factors and fake quantization come after it; on their layers it is refused.
    """

    method: ClassVar[str] = "structured_pruning"
    stage: ClassVar[int] = Stage.STRUCTURED

    def __init__(
        self,
        budget: Budget | None = None,
        *,
        criterion: Criterion = Magnitude(),
        schedule: Schedule = Window(Cubic(), start=0.1, end=0.6),
        ranking: Ranking = Global(),
        targets: Targets | str | list[str] | None = None,
        amounts: dict[str, float] | None = None,
        round_to: int = 1,
        min_channels: int = 2,
        max_amount: float = 0.9,
        events: int = 10,
        heads: Literal["dim", "head"] = "dim",
        reduction: Reduction = "mean",
        normalizer: Normalizer | None = "mean",
        calibration_batches: int = 16,
        regularizer: SparsityRegularizer | None = None,
        reestimate_batch_norm: int = 0,
        dry_run: bool = False,
    ) -> None:
        check_arguments(
            budget,
            amounts,
            heads,
            round_to=round_to,
            min_channels=min_channels,
            max_amount=max_amount,
            events=events,
            calibration_batches=calibration_batches,
            reestimate_batch_norm=reestimate_batch_norm,
        )
        check_names("StructuredPruning", reduction=reduction, normalizer=normalizer)
        self.budget = budget
        self.criterion = criterion
        self.schedule = schedule
        self.ranking = ranking
        self.targets = targets
        self.amounts = amounts
        self.round_to = round_to
        self.min_channels = min_channels
        self.max_amount = max_amount
        self.events = events
        self.heads = heads
        self.reduction = reduction
        self.normalizer = normalizer
        self.calibration_batches = calibration_batches
        self.regularizer = regularizer
        self.reestimate_batch_norm = reestimate_batch_norm
        self.dry_run = dry_run
        self._points: list[tuple[float, float]] = []
        self._capture: Capture | None = None
        self._watch: ActivationWatch | None = None
        self._graph: DependencyGraph | None = None
        self._last_plan: Plan | None = None

    # Lightning's hooks, in the order a run meets them.

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Resolve the schedule, so that what cannot work is said before anything is trained."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._points = event_points(resolve(self.schedule, trainer.max_epochs), self.events)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the layers as they are now, also those made in ``configure_model``."""
        super().on_fit_start(trainer, pl_module)
        refuse_unprunable(pl_module)
        as_targets(self.targets).select(pl_module)
        for pattern in self.amounts or {}:
            as_targets(pattern).select(pl_module)
        if not self.resumed(pl_module):
            _begin_anew(self.state(pl_module))
        batch_norm.resume(pl_module, self.state(pl_module).get("momenta", {}))
        self._graph = None
        self._capture = restore_or_capture_example(pl_module, self.state(pl_module))
        if "activation" in self.criterion.needs:
            self._watch = ActivationWatch(pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Cut, if a cut is due: before the batch, so that no checkpoint pairs new weights with an old metric."""
        due = self._due(trainer)
        if due > self.state(pl_module).get("events", 0) and self._is_ready(pl_module):
            self._cut(trainer, pl_module, due)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Gather gradients, accumulated and unscaled as they are here; then add the penalty to them."""
        if self._is_gathering(trainer, pl_module):
            sums = self.state(pl_module).setdefault("gathered", {})
            add_gradients(sums, pl_module, self.criterion, (p for g in optimizer.param_groups for p in g["params"]))
        if self.regularizer is not None and not self._is_finished(pl_module):
            groups = self._penalized(pl_module)
            add_penalty(pl_module, groups, self.regularizer, self._phase(trainer))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count what was gathered, and the batches over which batch norm is re-estimated."""
        state = self.state(pl_module)
        remember(state, self._capture)
        if self._is_gathering(trainer, pl_module):
            state["seen"] = state.get("seen", 0) + 1
            if self._watch is not None:
                self._watch.move_to(state.setdefault("gathered", {}), lambda tensor: reduce_mean(trainer, tensor))
        elif self._watch is not None:
            self._watch.forget()
        if state.get("batches_left", 0) > 0:
            state["batches_left"] -= 1
            if state["batches_left"] == 0:
                batch_norm.restore(pl_module, state.pop("momenta"))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so, if nothing was removed."""
        state = self.state(pl_module)
        if not self.dry_run and not state.get("removed", 0) and not getattr(trainer, "fast_dev_run", False):
            self._no_effect(self._why_nothing(state))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind, and no layer in the middle of a re-estimation."""
        batch_norm.restore(pl_module, self.state(pl_module).get("momenta", {}))
        for held in (self._capture, self._watch):
            if held is not None:
                held.remove()
        self._capture, self._watch, self._graph = None, None, None
        super().teardown(trainer, pl_module, stage)

    @override
    def window(self, max_epochs: int | None) -> tuple[float, float] | None:
        """From the first cut to the last."""
        points = event_points(resolve(self.schedule, max_epochs), self.events)
        return (points[0][0], points[-1][0]) if points else None

    # Private: the small questions the hooks ask.

    def _due(self, trainer: Trainer) -> int:
        return points_done(self._points, training_progress(trainer), steps_planned(trainer))

    def _is_ready(self, pl_module: LightningModule) -> bool:
        """Whether there is an example, and what the criterion needs has been gathered."""
        if self._capture is None or self._capture.example is None:
            return False
        seen: int = self.state(pl_module).get("seen", 0)
        return not self._needs_data or seen >= self.calibration_batches

    @property
    def _needs_data(self) -> bool:
        return bool(self.criterion.needs - {"generator"})

    def _is_finished(self, pl_module: LightningModule) -> bool:
        return bool(self.state(pl_module).get("events", 0) >= len(self._points)) or self.dry_run

    def _is_gathering(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether the next cut is at most ``calibration_batches`` steps away."""
        if not self._needs_data or self._is_finished(pl_module):
            return False
        progress, _ = self._points[self.state(pl_module).get("events", 0)]
        return bool(steps_done(trainer) + self.calibration_batches >= progress * steps_planned(trainer))

    def _phase(self, trainer: Trainer) -> float:
        return min(training_progress(trainer) / max(self._points[-1][0], 1e-9), 1.0)

    def _penalized(self, pl_module: LightningModule) -> Sequence[ChannelGroup]:
        if self._capture is None or self._capture.example is None:
            return ()
        graph = self._couple(pl_module, self._capture.example.to(pl_module))
        return [group for group in graph.groups if group.reason is None]

    def _couple(self, pl_module: LightningModule, example: ExampleInput) -> DependencyGraph:
        """Traced once, and again where somebody else has changed the network."""
        if self._graph is None or not self._graph.fits(pl_module):
            self._graph = trace_dependencies(pl_module, example.args, example.kwargs, heads=self.heads)
        return self._graph

    def _cut(self, trainer: Trainer, pl_module: LightningModule, due: int) -> None:
        """One event: decide on rank 0, cut everywhere, let everything follow."""
        assert self._capture is not None
        assert self._capture.example is not None  # `_is_ready`
        example, state = self._capture.example.to(pl_module), self.state(pl_module)
        graph = self._couple(pl_module, example)
        share = self._points[due - 1][1]
        plan = self._decide(trainer, pl_module, graph, example, share)
        self._last_plan = plan
        if self.dry_run:
            log_rank_zero(trainer, "\n".join([f"{self.method}: dry run, nothing is removed", *plan.lines()]))
        elif plan.removed:
            kept = graph.kept_positions(plan.kept)
            edit = cut(
                pl_module,
                kept,
                attributes=graph.attributes(pl_module, plan.kept),
                optimizers=trainer.optimizers,
                averaged_models=averaged_models_of(trainer, pl_module),
            )
            state["removed"] = state.get("removed", 0) + plan.removed
            self._graph = graph.after_pruning(plan.kept)
            self._after_surgery(
                trainer, pl_module, edit.entry(), self._summary(plan, first="share" not in state), kept=kept
            )
        state |= {"events": due, "seen": 0, "share": share}
        state.pop("gathered", None)
        if due == len(self._points) and self.reestimate_batch_norm and not self.dry_run:
            state |= {"momenta": batch_norm.begin(pl_module), "batches_left": self.reestimate_batch_norm}
        self._log(trainer, plan, share)

    def _decide(
        self, trainer: Trainer, pl_module: LightningModule, graph: DependencyGraph, example: ExampleInput, share: float
    ) -> Plan:
        """The plan of rank 0, on every rank; so is its refusal."""
        state = self.state(pl_module)
        gathered = mean_evidence(state.get("gathered", {}))
        state.setdefault("original", {group.name: group.width for group in graph.groups})
        limit = 0.0 if self.budget is None else self.budget.at(self._dense(trainer, pl_module, graph, example), share)
        outcome: Plan | LightningLightError | None = None
        if trainer.is_global_zero:
            try:
                outcome = plan_channels(
                    pl_module,
                    graph,
                    self.options(),
                    budget=self.budget,
                    limit=limit,
                    share=share,
                    original=_widths(graph, state["original"]),
                    example=example,
                    gathered=gathered,
                    generator=torch.Generator().manual_seed(state.get("events", 0)),
                )
            except LightningLightError as error:
                outcome = error
        outcome = broadcast(trainer, outcome)
        if isinstance(outcome, LightningLightError):
            raise outcome
        assert outcome is not None  # rank 0 has one
        return outcome

    def _dense(
        self, trainer: Trainer, pl_module: LightningModule, graph: DependencyGraph, example: ExampleInput
    ) -> float:
        """What the budget counts, of the network as it was before the first cut of the first run."""
        assert self.budget is not None
        known: dict[str, float] = self.state(pl_module).setdefault("dense", {})
        if self.budget.quantity not in known:
            measured = quantity(pl_module, self.budget, example, graph.groups)
            known[self.budget.quantity] = broadcast(trainer, measured)
        return known[self.budget.quantity]

    def options(self) -> Options:
        """How channels are chosen, for `plan_channels`."""
        return Options(
            criterion=self.criterion,
            ranking=self.ranking,
            targets=as_targets(self.targets),
            amounts=self.amounts or {},
            round_to=self.round_to,
            min_channels=self.min_channels,
            max_amount=self.max_amount,
            reduction=self.reduction,
            normalizer=self.normalizer,
        )

    def _summary(self, plan: Plan, *, first: bool) -> str:
        lines = "\n  ".join(plan.lines() if first else plan.cuts())
        reached = "" if self.budget is None else f", {self.budget.quantity} {plan.before:.6g} -> {plan.after:.6g}"
        return f"{plan.removed} channels removed{reached}\n  {lines}"

    def _log(self, trainer: Trainer, plan: Plan, share: float) -> None:
        scalars = {f"{self.method}/share": share, f"{self.method}/channels_removed": float(plan.removed)}
        if self.budget is not None:
            scalars[f"{self.method}/{self.budget.quantity}"] = plan.after
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=steps_done(trainer))

    def _why_nothing(self, state: Mapping[str, Any]) -> str:
        if self._last_plan is None:
            if self._capture is None or self._capture.example is None:
                return (
                    "the LightningModule was never called, so its input is not known. Set `example_input_array`, or "
                    "call `self(...)` in `training_step`."
                )
            return f"the run ended before a cut was due; `schedule={self.schedule!r}` has them at {self._points}."
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self._last_plan.skipped.items())
        if self._last_plan.kept:
            return f"the budget is met by the network as it is: {self.budget!r}. {reasons}"
        return f"no layer may lose channels. {reasons}"


def _begin_anew(state: dict[str, Any]) -> None:
    """A second run counts its cuts from the start; a budget still means the network as it was built."""
    for name in set(state) - {"dense", "original", "removed"}:
        del state[name]


def _widths(graph: DependencyGraph, original: Mapping[str, int]) -> dict[str, int]:
    return {group.name: original.get(group.name, group.width) for group in graph.groups}
