"""`DynamicSparseTraining`: sparse from the first step, while connections are dropped and grown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_light.budgets import Sparsity
from lightning_light.criteria import Criterion, Gathered, check_needs
from lightning_light.criteria.random import Random
from lightning_light.errors import UnsupportedError
from lightning_light.order import DEFAULT_WINDOWS, Stage
from lightning_light.progress import epochs_planned, progress_at_step, steps_done, steps_planned
from lightning_light.schedules import Cosine, Schedule, Window, require_rising
from lightning_light.schema import Needs, Within
from lightning_light.sparsity.growth import Connections, DynamicMethod, RigL, SRigL, Static
from lightning_light.sparsity.mask_enforcer import parameters_of
from lightning_light.sparsity.mask_state import MaskState
from lightning_light.sparsity.masking import EVENTS, SAME, MaskingCallback
from lightning_light.sparsity.options import WeightPruningOptions, check_sparsity
from lightning_light.sparsity.scope import Scope
from lightning_light.sparsity.scores import score_weights
from lightning_light.surgery.distributed import reduce_mean
from lightning_light.targets import TargetsLike
from lightning_light.timing import Events
from lightning_light.validation import NonNegativeInt, PositiveInt, validated

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

__all__ = ["DynamicSparseTraining"]


class DynamicSparseTrainingState(MaskState, total=False):
    """What `DynamicSparseTraining` keeps in the compression state.

    Attributes:
        connections: weight name -> number of connections after the first mask.
        updates: number of updates.
        planned_steps: planned length of the run at the last update.
    """

    connections: Annotated[dict[str, NonNegativeInt], Within("masks"), Needs("fraction", "planned_steps")]
    updates: NonNegativeInt
    planned_steps: NonNegativeInt


@validated
class DynamicSparseTraining(MaskingCallback):
    """Train a sparse network: drop weak connections and grow others, at a constant sparsity.

    A grown connection starts at zero, and so does its optimizer state. The dense network is never trained; its weights
    take the memory of dense weights.

    Evci et al., 2020, "Rigging the Lottery: Making All Tickets Winners". https://arxiv.org/abs/1911.11134

    Example:
        >>> DynamicSparseTraining(Sparsity(0.9), method=SRigL())
        DynamicSparseTraining(budget=Sparsity(amount=0.9), method=SRigL(fraction=0.3, min_salient=0.3))

    Args:
        budget: ``Sparsity(amount)`` of the targets' weights, from the first step of the schedule on.
        method: `RigL`, `SRigL`, `SET`, or `Static` for the baseline without updates.
        criterion: selects the first connections, from the weights alone: `Random`, or `Magnitude` for a trained
            network.
        schedule: the network becomes sparse at its start, and the last connection is replaced at its end; in between
            the fraction that is replaced decays as the schedule rises (`RigL`, `SRigL`).
        scope: how the sparsity is distributed: ``"erk"``, lower in small layers; ``"local"``, the same in each layer;
            ``"global"`` or ``"lamp"``, by the scores of the criterion.
        targets: layers whose weights are sparse: patterns or `Targets`.
        every_n_steps: optimizer steps between two updates; None for 20 updates.
        seed: of random numbers.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an argument out of range, or a schedule that falls.
        TargetError: ``targets`` match nothing.
        BudgetError: the budget leaves a layer without weights.
        OrderError: another callback masks one of the weights.
        UnsupportedError: a strategy that shards parameters; a frozen layer, in which nothing can grow; a criterion that
            needs training data.
    """

    method: ClassVar[str] = "dynamic_sparse_training"
    state_schema: ClassVar[Any] = DynamicSparseTrainingState

    def __init__(
        self,
        budget: Sparsity,
        *,
        method: DynamicMethod = RigL(),
        criterion: Criterion = Random(),
        schedule: Schedule = Window(Cosine(), 0.0, DEFAULT_WINDOWS[Stage.MASKS][1]),
        scope: Scope = "erk",
        targets: TargetsLike = None,
        every_n_steps: PositiveInt | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(Events(schedule, every_n_steps, default_events=EVENTS))
        call = type(self).__name__
        check_sparsity(call, budget)
        check_needs(call, criterion, frozenset())
        require_rising(call, schedule)
        self.options = WeightPruningOptions(budget, criterion, scope=scope, targets=targets, seed=seed)
        self.budget = budget
        self.method = method  # type: ignore[misc, assignment]  # the argument of this name; the key is the class's
        self.criterion = criterion
        self.schedule = schedule
        self.scope: Scope = scope
        self.targets = targets
        self.every_n_steps = every_n_steps
        self.seed = seed
        self._rule = method

    # Lightning's hooks, in the order a run meets them.

    @override
    def _change_masks(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Become sparse, or replace connections, if that is due: between two steps."""
        state = self.state(pl_module)
        if not state["masks"]:
            if progress_at_step(trainer) + SAME >= self._events.window(epochs_planned(trainer))[0]:
                self._begin(trainer, pl_module)
        elif "connections" not in state:  # the masks of an earlier fit
            self._start_from(trainer, pl_module)
        elif self._is_due(trainer, state) and self._is_ready(state):
            self._update(trainer, pl_module)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Keep the dense gradients of the step before an update, accumulated, reduced and unscaled; then mask them."""
        state = self.state(pl_module)
        if self._rule.needs_gradient and "connections" in state and self._is_due(trainer, state, ahead=1):
            kept, stepped = state.setdefault("per_weight", {}).setdefault("gradients", {}), parameters_of(optimizer)
            for weight in self._weights:
                gradient = weight.parameter.grad if weight.parameter in stepped else None
                if gradient is not None and bool(gradient.isfinite().all()):  # else a scaled backward has overflowed
                    kept[weight.name] = gradient.detach().float().clone()
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    # Private.

    @override
    def _check_plan(self, masks: Mapping[str, Tensor]) -> None:
        normed = [weight.layer for weight in self._weights if weight.source.norm == "weight norm"]
        if normed:
            exclude = f"`targets=Targets(exclude={normed})`"
            raise UnsupportedError(
                f"`{type(self).__name__}`: expected plain weights, found weight norm in {normed[:3]}: a filter that "
                f"loses all connections would be divided by zero. Exclude them, {exclude}, or use `WeightPruning`."
            )
        frozen = [weight.layer for weight in self._weights if not weight.parameter.requires_grad]
        if frozen and not isinstance(self._rule, Static):
            raise UnsupportedError(
                f"`{type(self).__name__}(method={self._rule!r})`: expected trainable weights, found frozen ones, which "
                f"have no gradient to grow by, in {frozen[:3]}. Exclude them: `targets=Targets(exclude={frozen})`."
            )

    @override
    def _no_effect_reason(self, pl_module: LightningModule) -> str | None:
        state = self.state(pl_module)
        masks = state["masks"]
        if not masks:
            return f"the run ended before the start of `schedule={self.schedule!r}`."
        if all(bool(mask.all()) for mask in masks.values()):
            return f"`{self.options.budget!r}` masks less than one weight of {len(masks)} layers."
        missed = self._without_gradient(state)
        if self._rule.needs_gradient and missed and not state.get("updates"):
            return f"no connection was replaced: no gradient reached {missed[:3]}. Exclude these layers from `targets`."
        return None

    def _without_gradient(self, state: Mapping[str, Any]) -> list[str]:
        """Layers without a gradient, where some have one."""
        gradients = state.get("per_weight", {}).get("gradients", {})
        return [weight.layer for weight in self._weights if weight.name not in gradients] if gradients else []

    def _is_due(self, trainer: Trainer, state: Mapping[str, Any], ahead: int = 0) -> bool:
        """Whether an update is due, counted from the plan of the run as it was at the last one."""
        if isinstance(self._rule, Static):
            return False
        due = self._fraction_due(trainer, ahead)
        same_plan = state["planned_steps"] == self._planned_steps
        reached = state["fraction"] if same_plan else self._fraction_due(trainer, ahead - 1)
        return due > reached + SAME and steps_done(trainer) + ahead < self._planned_steps

    def _is_ready(self, state: Mapping[str, Any]) -> bool:
        gradients = state.get("per_weight", {}).get("gradients", {})
        return not self._rule.needs_gradient or bool(gradients and not self._without_gradient(state))

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Select the first masks: the numbers by the scope, the connections by the criterion."""
        generator = torch.Generator().manual_seed(self.options.seed)
        scores = score_weights(self._weights, self.options.criterion, Gathered(), generator)
        masks = self._plan.masks(scores, 1.0)
        if isinstance(self._rule, SRigL):
            for weight in self._weights:
                own = self._rule.initial_mask(scores[weight.name], int(masks[weight.name].sum()))
                masks[weight.name] = weight.oriented(own).contiguous()
        churn = self._set_masks(trainer, pl_module, masks)
        self._start_from(trainer, pl_module)
        self._report(trainer, pl_module, churn, restart=True)

    def _start_from(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = self.state(pl_module)
        state["connections"] = {name: int(mask.sum()) for name, mask in state["masks"].items()}
        state |= {"fraction": self._fraction_due(trainer), "planned_steps": steps_planned(trainer)}

    def _update(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop and grow connections in every layer."""
        state = self.state(pl_module)
        completed, updates = self._fraction_due(trainer), state.get("updates", 0)
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + updates + 1)
        gradients = state.get("per_weight", {}).get("gradients", {})
        masks = {}
        for weight in self._weights:
            gradient = gradients.get(weight.name)
            if gradient is not None:
                gradient = weight.oriented(reduce_mean(trainer, gradient.to(weight.parameter.device)))
            mask = state["masks"][weight.name].to(weight.parameter.device)
            count = state["connections"].get(weight.name, int(mask.sum()))
            weights = weight.oriented(weight.parameter.detach())
            now = Connections(weights, weight.oriented(mask), gradient, count, generator)
            masks[weight.name] = weight.oriented(self._rule.update(now, self._rule.fraction_at(completed))).contiguous()
        churn = self._set_masks(trainer, pl_module, masks)
        state |= {"updates": updates + 1, "fraction": completed, "planned_steps": steps_planned(trainer)}
        state.get("per_weight", {}).pop("gradients", None)
        self._report(trainer, pl_module, churn, restart=False)
