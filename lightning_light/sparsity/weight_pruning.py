"""`WeightPruning`: mask the least important weights while the network trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_light.budgets import Sparsity
from lightning_light.criteria import Criterion, EvidenceCollector
from lightning_light.criteria.gathered import PARAMETER_KINDS, EvidenceStorage
from lightning_light.order import DEFAULT_WINDOWS, Stage
from lightning_light.progress import epochs_planned, progress_at_step
from lightning_light.schedules import Cubic, Schedule, Window, require_rising
from lightning_light.sparsity.mask_enforcer import parameters_of
from lightning_light.sparsity.mask_schedules import Rewinding
from lightning_light.sparsity.mask_state import MaskState
from lightning_light.sparsity.masking import EVENTS, SAME, MaskingCallback
from lightning_light.sparsity.options import WeightPruningOptions
from lightning_light.sparsity.patterns import Pattern
from lightning_light.sparsity.planning import check_existing_masks
from lightning_light.sparsity.rewind import check_rewinding, rewind_weights, store_weights
from lightning_light.sparsity.scope import Scope
from lightning_light.sparsity.scores import score_weights
from lightning_light.surgery.distributed import reduce_mean
from lightning_light.targets import TargetsLike
from lightning_light.timing import Events
from lightning_light.validation import NonNegativeInt, OpenFraction, PositiveInt, validated

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

__all__ = ["WeightPruning"]


class WeightPruningState(MaskState, total=False):
    """What `WeightPruning` keeps in the compression state.

    Attributes:
        evidence: what the criterion reads, while it is gathered.
        events: number of changes of the masks.
        most_masked: largest number of masked weights.
    """

    evidence: EvidenceStorage
    events: NonNegativeInt
    most_masked: NonNegativeInt


@validated
@dataclass(eq=False, repr=False)
class WeightPruning(MaskingCallback):
    """Mask the least important weights gradually, and keep them at zero.

    Shapes do not change. The masks are in the compression state, so the module's ``state_dict`` keeps its keys.
    A masked weight, its gradient and its optimizer state are exactly zero after every step. Sparsity alone makes
    nothing smaller or faster: `measure_sparsity` reports compressed size and effective MACs.

    Training on without this callback lets masked weights become nonzero again; masks that no longer hold are left out
    of checkpoints, with a warning.

    Zhu & Gupta, 2017, "To prune, or not to prune: exploring the efficacy of pruning for model compression".
    https://arxiv.org/abs/1710.01878

    Example:
        >>> WeightPruning(Sparsity(0.9), scope="erk")
        WeightPruning(budget=Sparsity(amount=0.9), scope='erk')
        >>> from lightning_light.sparsity import NM
        >>> WeightPruning(pattern=NM(2, 4))
        WeightPruning(pattern=NM(n=2, m=4))

    Args:
        budget: ``Sparsity(amount)`` of the targets' weights. None with `NM`, which determines it, or ``remaining``.
        criterion: scores weights; the lowest scores are masked first.
        schedule: progress -> fraction of the way to the budget. Where it falls, masks are lifted: `Alternating`,
            `DenseSparseDense`; `Rewinding` also resets weights.
        pattern: what is masked together: `Unstructured`, `NM`, `Block`, `Filter`, `Kernel`, `Row`, `Column`.
        scope: ``"global"``, one threshold for all; ``"local"``, the same sparsity in each layer; ``"erk"``, a higher
            one in larger layers; ``"lamp"``, global after scaling each layer's scores.
        targets: layers whose weights may be masked: patterns or `Targets`.
        remaining: layer pattern -> fraction of its weights that remain, in (0, 1]; overrides the budget there.
        every_n_steps: optimizer steps between two changes of the masks; None for 20 changes.
        calibration_batches: optimizer steps before a change over which a criterion's evidence is gathered.
        seed: for criteria that draw random numbers.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an argument out of range, arguments that contradict each other, or a schedule that falls without
            declaring it.
        TargetError: ``targets`` match nothing, or a layer that the pattern does not divide.
        BudgetError: the budget leaves a layer without weights, or is below the sparsity that masks have already.
        OrderError: another callback masks one of the weights.
        UnsupportedError: a strategy that shards parameters; evidence that a layer cannot give.
    """

    method: ClassVar[str] = "weight_pruning"
    state_schema: ClassVar[Any] = WeightPruningState

    budget: Sparsity | None = WeightPruningOptions.budget
    _: KW_ONLY
    criterion: Criterion = WeightPruningOptions.criterion
    schedule: Schedule = Window(Cubic(), *DEFAULT_WINDOWS[Stage.MASKS])
    pattern: Pattern = WeightPruningOptions.pattern
    scope: Scope = WeightPruningOptions.scope
    targets: TargetsLike = WeightPruningOptions.targets
    remaining: dict[str, OpenFraction] | None = WeightPruningOptions.remaining
    every_n_steps: PositiveInt | None = None
    calibration_batches: PositiveInt = WeightPruningOptions.calibration_batches
    seed: int = WeightPruningOptions.seed

    def __post_init__(self) -> None:
        super().__init__(Events(self.schedule, self.every_n_steps, default_events=EVENTS))
        self.options = self.options_as(WeightPruningOptions)
        self.options.check(type(self).__name__)
        if self.schedule.monotone:
            require_rising(type(self).__name__, self.schedule)
        self._evidence_collector: EvidenceCollector | None = None

    # Lightning's hooks, in the order a run meets them.

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Resolve the schedule, and refuse to rewind to a moment that does not precede it."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_rewinding(self.schedule, epochs_planned(trainer))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plan the run, and prepare to gather evidence."""
        super().on_fit_start(trainer, pl_module)
        self._collect(pl_module)

    @override
    def _change_masks(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Change the masks if that is due, before the batch and its metrics."""
        state = self.state(pl_module)
        self._store_origin(trainer, pl_module)
        fraction = self._target(trainer, state)
        if abs(fraction - state.get("fraction", 0.0)) > SAME and (fraction == 0.0 or self._is_ready()):
            self._prune(trainer, pl_module, fraction)
        self._collector.begin_batch(
            self._needs_batches and self._is_due(trainer, state, ahead=self.calibration_batches)
        )

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Gather evidence from the dense gradients, accumulated, reduced and unscaled; then mask them."""
        finished = self.schedule.monotone and self.state(pl_module).get("fraction", 0.0) >= 1.0
        if self.options.criterion.needs & PARAMETER_KINDS and not finished:
            stepped = parameters_of(optimizer)
            self._collector.observe_step([w.parameter for w in self._weights if w.parameter in stepped])
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Store the evidence of the batch."""
        self._collector.end_batch((lambda tensor: reduce_mean(trainer, tensor)) if trainer.world_size > 1 else None)

    @override
    def on_surgery(
        self, trainer: Trainer, pl_module: LightningModule, kept: Mapping[str, Mapping[int, Tensor]] | None
    ) -> None:
        """Cut masks and evidence with the weights."""
        super().on_surgery(trainer, pl_module, kept)
        self._collector.follow(kept)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks."""
        if self._evidence_collector is not None:
            self._evidence_collector.remove()
        self._evidence_collector = None
        super().teardown(trainer, pl_module, stage)

    # Private.

    @property
    def _collector(self) -> EvidenceCollector:
        assert self._evidence_collector is not None  # since `on_fit_start`
        return self._evidence_collector

    def _collect(self, pl_module: LightningModule) -> None:
        layers = [weight.layer for weight in self._weights]
        self._evidence_collector = EvidenceCollector.for_criterion(
            pl_module, layers, self.criterion, lambda: self.state(pl_module).setdefault("evidence", {})
        )

    @override
    def _plan_again(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super()._plan_again(trainer, pl_module)
        self._collector.remove()
        self._collect(pl_module)

    @override
    def _check_plan(self, masks: Mapping[str, Tensor]) -> None:
        if self.schedule.monotone:
            check_existing_masks(type(self).__name__, self._plan, masks)

    @override
    def _no_effect_reason(self, pl_module: LightningModule) -> str | None:
        state = self.state(pl_module)
        if state.get("most_masked", 0) or any(not bool(mask.all()) for mask in state["masks"].values()):
            return None
        if state.get("events", 0):
            return f"`{self.options.budget!r}` masks less than one weight of {len(self._weights)} layers."
        return f"the run ended before the first change of the masks; `schedule={self.schedule!r}`."

    @property
    def _needs_batches(self) -> bool:
        return bool(self.options.criterion.needs - {"generator", "movement"})

    def _store_origin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the weights to rewind to, once, at their moment."""
        state = self.state(pl_module)
        due = isinstance(self.schedule, Rewinding) and progress_at_step(trainer) + SAME >= self.schedule.rewind_to
        if due and "events" not in state and "origin" not in state.get("per_weight", {}):
            state.setdefault("per_weight", {})["origin"] = store_weights(pl_module)

    def _target(self, trainer: Trainer, state: Mapping[str, Any], ahead: int = 0) -> float:
        """The fraction due; a rising schedule never falls back, also where the data has become longer."""
        target, reached = self._fraction_due(trainer, ahead), state.get("fraction", 0.0)
        return max(target, reached) if self.schedule.monotone else target

    def _is_due(self, trainer: Trainer, state: Mapping[str, Any], ahead: int = 0) -> bool:
        reached: float = state.get("fraction", 0.0)
        return abs(self._target(trainer, state, ahead) - reached) > SAME

    def _is_ready(self) -> bool:
        """Whether the criterion's evidence has been gathered, of every kind."""
        if self._needs_batches and self._collector.batches < self.options.calibration_batches:
            return False
        tensors = self._collector.means().tensors
        return all(tensors.get(kind) for kind in self.options.criterion.needs - {"generator"})

    def _prune(self, trainer: Trainer, pl_module: LightningModule, fraction: float) -> None:
        """Score, select the masks of all weights together, and apply them."""
        state = self.state(pl_module)
        extended = self.schedule.monotone or 0.0 < state.get("fraction", 0.0) < fraction
        masks = self._select(trainer, pl_module, fraction, state["masks"] if extended else {})
        churn = self._set_masks(trainer, pl_module, masks)
        most = sum(int((~mask).sum()) for mask in state["masks"].values())
        events, most = state.get("events", 0) + 1, max(state.get("most_masked", 0), most)
        state |= {"fraction": fraction, "events": events, "most_masked": most}
        self._collector.forget()
        if fraction == 0.0:
            state["masks"] = {}
            self.disclaim(pl_module)
        origin = state.get("per_weight", {}).get("origin")
        if origin is not None and churn > 0.0:
            rewind_weights(pl_module, origin, state["masks"], trainer.optimizers)
        self._report(trainer, pl_module, churn, restart=churn > 0.0)

    def _select(
        self, trainer: Trainer, pl_module: LightningModule, fraction: float, current: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        if fraction == 0.0:  # masks are lifted: what was masked starts at zero
            return {weight.name: torch.ones_like(weight.parameter, dtype=torch.bool) for weight in self._weights}
        events = self.state(pl_module).get("events", 0)
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + events)
        scores = score_weights(self._weights, self.options.criterion, self._collector.means(), generator)
        return self._plan.masks(scores, fraction, current)
