"""`DepthPruning`: remove the least important residual blocks while the network trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from lightning_light.budgets import Budget, require_reducible
from lightning_light.depth.blocks import METHOD, Blocks, remove_blocks
from lightning_light.depth.criteria import BlockCriterion
from lightning_light.depth.functional import prune_blocks
from lightning_light.depth.options import DepthPruningOptions
from lightning_light.depth.plan import DepthPlan, check_budget, plan_blocks
from lightning_light.example_input import ExampleInput
from lightning_light.measure.latency_table import LatencyTable, quantity
from lightning_light.order import DEFAULT_WINDOWS, Stage
from lightning_light.recorded_inputs import RecordedState, ScheduledChanges
from lightning_light.schedules import Linear, Schedule, Window, require_rising
from lightning_light.surgery.distributed import log_rank_zero
from lightning_light.surgery.stored_example import stored_calls
from lightning_light.targets import Targets, as_targets
from lightning_light.timing import Events
from lightning_light.validation import NonNegativeInt, PositiveInt, validated

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import nn
    from torch.optim import Optimizer

__all__ = ["DepthPruning"]


class _State(RecordedState, total=False):
    """What a checkpoint holds of a run.

    Attributes:
        events: how many events are done.
        removed: names of the removed blocks, in order.
        planned: whether the whole run was found possible.
    """

    events: NonNegativeInt
    removed: list[str]
    planned: bool


@validated
@dataclass(eq=False, repr=False)
class DepthPruning(ScheduledChanges):
    """Remove whole residual blocks, the least important first, until the network meets ``budget``.

    A residual block computes ``x + f(x)`` without changing the shape; removed, it returns its input. Blocks are found
    by their function, in convolutional networks and transformers alike. Each removal saves the latency of all layers of
    the block, which narrower layers do not. Blocks are scored on the inputs of the last training batches, again after
    each removal, and training continues between the events.

    Example:
        >>> from lightning_light.budgets import MACs
        >>> DepthPruning(MACs(0.7), schedule=Window(Linear(), start=0.1, end=0.4))
        DepthPruning(budget=MACs(remaining=0.7), schedule=Window(schedule=Linear(), start=0.1, end=0.4))

    Args:
        budget: what the network is to reach: ``MACs``, ``Params``, ``Size`` or ``Latency``.
        criterion: `OutputChange` or `BlockInfluence`: the block with the lowest score is removed first.
        schedule: progress -> fraction of the way to the budget; it must not fall. A block is removed at each event
            at which the budget of that fraction is exceeded.
        every_n_steps: optimizer steps between two events; None for ten events.
        targets: residual blocks that may be removed: patterns or `Targets`; all by default.
        calibration_batches: training batches before an event on which blocks are scored and batch-norm statistics are
            corrected; at most 16 samples of each.
        correct_batch_norm: move the batch-norm statistics by what a removal did to them.
        dry_run: remove nothing, and log at each event what would be removed for that point of the schedule.

    Raises:
        TypeError: an argument has the wrong type; at construction.
        ValueError: an argument is out of range, or the schedule falls; at construction.
        BudgetError: the budget cannot be reached; before the first optimizer step.
        TargetError: ``targets`` match no module.
        UnsupportedError: the training step does not call ``self(...)``, a strategy or launcher that cannot follow, or a
            layer that a later method has changed.

    Note:
        Before structured pruning. What is not a residual block is kept; the log has the reasons at debug level.
    """

    method: ClassVar[str] = METHOD
    function: ClassVar[str] = "prune_blocks"
    stage: ClassVar[int] = Stage.DEPTH
    state_schema: ClassVar[Any] = _State

    budget: Budget
    _: KW_ONLY
    criterion: BlockCriterion = DepthPruningOptions.criterion
    schedule: Schedule = Window(Linear(), *DEFAULT_WINDOWS[Stage.DEPTH])
    every_n_steps: PositiveInt | None = None
    targets: Targets | str | list[str] | None = DepthPruningOptions.targets
    calibration_batches: PositiveInt = DepthPruningOptions.calibration_batches
    correct_batch_norm: bool = DepthPruningOptions.correct_batch_norm
    dry_run: bool = False

    def __post_init__(self) -> None:
        require_reducible("DepthPruning", self.budget, "channels")
        require_rising("DepthPruning", self.schedule)
        self.options = self.options_as(DepthPruningOptions)
        self._events = Events(self.schedule, self.every_n_steps)
        self._last_plan: DepthPlan | None = None

    # Lightning's hooks, in the order a run meets them.

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the targets, and plan the run if the example input is known."""
        super().on_fit_start(trainer, pl_module)
        as_targets(self.targets).select(pl_module)
        self._last_plan = None
        self.record_inputs(pl_module, "events", "planned", "latency")
        self._plan_run(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Act if it is due: before the batch, so that no checkpoint pairs new weights with an old metric."""
        state = self.state(pl_module)
        due = self._due(trainer)
        if due > state.get("events", 0) and state.get("planned") and state.get("inputs"):
            self._act(trainer, pl_module, due)
        assert self.recorder is not None  # since `on_fit_start`
        self.recorder.active = state.get("events", 0) < len(self._points)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Plan the run, if that was not possible before."""
        self._plan_run(trainer, pl_module)

    @override
    def _no_effect_reason(self, pl_module: LightningModule) -> str | None:
        if self.dry_run or self.state(pl_module).get("removed"):
            return None
        if self._last_plan is None:
            return f"the run ended before the first event; `schedule={self.schedule!r}`."
        return f"the network meets `{self.budget!r}` as it is. {'; '.join(self._last_plan.lines())}."

    @override
    def rehearse(self, model: nn.Module, example: ExampleInput, batches: Sequence[Any]) -> list[str]:
        """Remove the blocks that the budget does not need."""
        data = list(batches) or None
        return prune_blocks(model, example, self.budget, **vars(self.options), data=data).lines()

    # Private.

    def _plan_run(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check, once per fit and as soon as the example input is known, that the budget can be reached."""
        state = self.state(pl_module)
        if not state.get("planned") and self.has_example(pl_module):
            self._check(trainer, pl_module, fraction=1.0)
            state["planned"] = True

    def _check(self, trainer: Trainer, pl_module: LightningModule, fraction: float) -> tuple[Blocks, float]:
        """Return the blocks that can be removed, and the goal after ``fraction`` of the way; on every rank alike."""
        example, budget = self.example(pl_module), self.budget
        goal = budget.at(self.reference(trainer, pl_module, budget), fraction)

        def check(table: LatencyTable | None) -> Blocks:
            measure = partial(quantity, budget, pl_module, example, table)
            return check_budget(pl_module, budget, example, self.options, goal, measure)

        return self.decided(trainer, pl_module, budget, check), goal

    def _act(self, trainer: Trainer, pl_module: LightningModule, due: int) -> None:
        """Remove the blocks that are due at event ``due``: decided on rank 0, carried out on every rank."""
        state, example, budget = self.state(pl_module), self.example(pl_module), self.budget
        blocks, goal = self._check(trainer, pl_module, self._points[due - 1][1])
        calls = stored_calls(pl_module, state)

        def decide(table: LatencyTable | None) -> DepthPlan:
            measure = partial(quantity, budget, pl_module, example, table)
            return plan_blocks(pl_module, blocks, self.criterion, calls, goal, measure)

        plan = self._last_plan = self.decided(trainer, pl_module, budget, decide)
        dense = self.reference(trainer, pl_module, budget)
        summary = f"{type(self.budget).__name__} {100 * plan.after / dense:.0f} %, removed {', '.join(plan.removed)}"
        if self.dry_run:
            log_rank_zero(trainer, "\n  ".join([f"{self.method}: dry run, nothing is removed", *plan.lines()]))
        elif plan.removed:
            remove = partial(remove_blocks, pl_module, plan.removed)
            entry = self.change(trainer, pl_module, remove, calls if self.correct_batch_norm else [])
            self._after_surgery(trainer, pl_module, entry, summary, part=f"{due}/{len(self._points)}")
            state["removed"] = [*state.get("removed", []), *plan.removed]
        state["events"] = due
        if due == len(self._points):
            state.pop("inputs", None)
