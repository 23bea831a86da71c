"""Base class of the masking callbacks: masks in the compression state, enforced at every step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor, nn
from typing_extensions import override

from lightning_light.callback import CompressionCallback
from lightning_light.capture import has_lazy_layers
from lightning_light.errors import OrderError
from lightning_light.example_input import ExampleInput
from lightning_light.formatting import human_percent, plural
from lightning_light.helper_networks import frozen_parts
from lightning_light.host.trainer import callbacks_of
from lightning_light.measure.sparsity import mask_churn, zero_fraction, zero_rows
from lightning_light.order import Stage
from lightning_light.planning import criterion_for, not_targeted
from lightning_light.progress import epochs_planned, progress_at_step, steps_done, steps_planned
from lightning_light.sparsity.functional import prune_weights
from lightning_light.sparsity.mask_enforcer import MaskEnforcer, StepHooks, mask_model
from lightning_light.sparsity.mask_state import cut_masks
from lightning_light.sparsity.options import WeightPruningOptions
from lightning_light.sparsity.planning import PruningPlan, plan_pruning
from lightning_light.sparsity.weights import MaskableWeight
from lightning_light.surgery.attachment import check_owners
from lightning_light.surgery.averaged_models import averaged_models_of
from lightning_light.surgery.checkpoint_monitoring import reset_monitoring
from lightning_light.surgery.distributed import broadcast, log_rank_zero
from lightning_light.surgery.masks import true_masks
from lightning_light.targets import as_targets
from lightning_light.timing import Events
from lightning_light.trained_weights import uncovered_parameters, uncovered_text

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

__all__ = ["EVENTS", "SAME", "MaskingCallback"]

EVENTS, SAME = 20, 1e-9


class _Known(NamedTuple):
    """The fraction that is due from step ``start`` until before ``stop`` of one epoch."""

    epoch: int
    start: int
    stop: float
    fraction: float


class MaskingCallback(CompressionCallback):
    """Base class of the methods that mask weights.

    The compression state is the only owner of the masks, under ``masks``; other tensors in the shapes of weights are
    under ``per_weight``, by kind and weight name, and are cut with the weights. A subclass implements
    `_no_effect_reason` and `_change_masks`, which calls `_set_masks` and `_report`, and may refuse a plan in
    `_check_plan`.
    """

    stage: ClassVar[int] = Stage.MASKS
    structural: ClassVar[bool] = False
    whole_parameters: ClassVar[tuple[str, str] | None] = (
        "masks are applied to the parameters themselves",
        "Prune on one device or with `strategy='ddp'`.",
    )
    options: WeightPruningOptions

    def __init__(self, events: Events) -> None:
        self._events = events
        self._points: list[tuple[float, float]] = []
        self._planned_steps = 0
        self._known: _Known | None = None
        self._run_plan: PruningPlan | None = None
        self._step_hooks: StepHooks | None = None
        self._left_alone: list[str] = []
        self._is_settled = True

    # Lightning's hooks, in the order a run meets them.

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plan the run; continue with the masks of a checkpoint, or of an earlier fit as far as they still hold."""
        super().on_fit_start(trainer, pl_module)
        state = self.state(pl_module)
        masks = state.get("masks", {}) if self.resumed(pl_module) else true_masks(pl_module, state.get("masks", {}))
        helpers = self._helper_networks(trainer, pl_module)
        self._is_settled = helpers is not None and not has_lazy_layers(pl_module)
        self._left_alone = frozen_parts(pl_module) if helpers is None else helpers
        self._run_plan = self._planned(pl_module)
        if self._is_settled or not masks:
            self._check_plan(masks)
        parameters = (weight.parameter for weight in self._weights)
        if uncovered := uncovered_parameters(pl_module, as_targets(self.options.targets), parameters):
            log_rank_zero(trainer, f"{type(self).method}: {uncovered_text(uncovered)}")
        self._refuse_overlap(trainer)
        if not self.resumed(pl_module):
            layers = [weight.layer for weight in self._weights]
            check_owners(pl_module, layers, method=type(self).method, stage=self.stage)
            state.clear()
            state["masks"] = masks
            if not masks:
                self.disclaim(pl_module)
        state.setdefault("masks", {})  # a checkpoint of a run without this callback has none
        self._watch(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Change the masks if that is due, before the batch and its metrics.

        Plan again first if it was not known which frozen parts belong to the network, or which shape all layers have.
        """
        if not self._is_settled and not has_lazy_layers(pl_module):
            self._left_alone = self._helper_networks(trainer, pl_module, batch) or []
            self._is_settled = True
            self._plan_again(trainer, pl_module)
        if self._is_settled:
            self._change_masks(trainer, pl_module)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Mask the gradients before they are clipped."""
        assert self._step_hooks is not None  # since `on_fit_start`
        self._step_hooks.before_step(optimizer)

    @override
    def on_surgery(
        self, trainer: Trainer, pl_module: LightningModule, kept: Mapping[str, Mapping[int, Tensor]] | None
    ) -> None:
        """Cut masks and other tensors with their weights; drop those of weights that are gone."""
        cut_masks(pl_module, self.state(pl_module), kept)
        self._run_plan = self._planned(pl_module)
        self._watch(trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks, and the references to the network."""
        if self._step_hooks is not None:
            self._step_hooks.release()
        self._step_hooks, self._run_plan, self._known = None, None, None
        super().teardown(trainer, pl_module, stage)

    @override
    def window(self, max_epochs: int | None) -> tuple[float, float] | None:
        """From the first change of the masks to the last."""
        return self._events.window(max_epochs)

    @override
    def rehearse(self, model: nn.Module, example: ExampleInput, batches: Sequence[Any]) -> list[str]:
        """Mask as much as the budget requires."""
        criterion, note = criterion_for(model, self.options.criterion, batches)
        given = {**vars(self.options), "criterion": criterion, "data": list(batches) or [example]}
        masks = prune_weights(model, example, **given)
        found = [f"{name}: {human_percent(zero_fraction([mask]))} masked" for name, mask in masks.items()]
        return [*note, *found, *not_targeted(model, [name.rpartition(".")[0] for name in masks])]

    # For subclasses.

    @property
    def _plan(self) -> PruningPlan:
        assert self._run_plan is not None  # since `on_fit_start`
        return self._run_plan

    @property
    def _weights(self) -> Sequence[MaskableWeight]:
        return self._plan.weights

    def _check_plan(self, masks: Mapping[str, Tensor]) -> None:
        """Refuse a plan that the method cannot follow, before any change. ``masks``: those that hold already."""

    def _change_masks(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Change the masks if that is due. Called before each training batch, once the weights are known."""
        raise NotImplementedError

    def _plan_again(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plan for other weights than in ``on_fit_start``; nothing is masked yet."""
        self._run_plan = self._planned(pl_module)
        self._check_plan(self._masks(pl_module))
        self._watch(trainer, pl_module)

    def _make_step_hooks(self, pl_module: LightningModule) -> StepHooks:
        """What acts before and after every optimizer step."""
        return MaskEnforcer(self._weights, lambda: self._masks(pl_module))

    def _masks(self, pl_module: LightningModule) -> dict[str, Tensor]:
        masks: dict[str, Tensor] = self.state(pl_module).setdefault("masks", {})
        return masks

    def _fraction_due(self, trainer: Trainer, ahead: int = 0) -> float:
        """The fraction of the way to the budget that is due ``ahead`` steps from now.

        It is computed at every step and changes at few of them, so a value is kept for the steps to which it applies.
        """
        step, known = steps_done(trainer) + ahead, self._known
        if known is not None and known.epoch == trainer.current_epoch and known.start <= step < known.stop:
            return known.fraction
        planned = steps_planned(trainer)
        if planned != self._planned_steps:
            self._points, self._planned_steps = self._events.points(epochs_planned(trainer), planned), planned
        progress = progress_at_step(trainer, ahead)
        due = self._events.due(self._points, progress, planned)
        fraction = self._points[due - 1][1] if due else 0.0
        if trainer.lightning_module.automatic_optimization:  # else the length of the run is an estimate
            following = self._points[due][0] if due < len(self._points) else math.inf
            steps = max((following - progress) * planned / 2, 1.0)
            self._known = _Known(trainer.current_epoch, step, step + steps, fraction)
        return fraction

    def _set_masks(self, trainer: Trainer, pl_module: LightningModule, masks: dict[str, Tensor]) -> float:
        """Replace the masks on every rank, and mask weights and averaged copies.

        Returns the fraction of mask entries that have changed.
        """
        if trainer.world_size > 1:
            masks = broadcast(trainer, {name: mask.cpu() for name, mask in masks.items()})
        devices = {weight.name: weight.parameter.device for weight in self._weights}
        masks = {name: mask.to(devices[name]) for name, mask in masks.items()}
        churn = mask_churn(self._masks(pl_module), masks)
        self.state(pl_module)["masks"] = masks
        self.claim(pl_module, [weight.layer for weight in self._weights], follows_cuts=True)
        if isinstance(self._step_hooks, MaskEnforcer):
            self._step_hooks.apply(trainer.optimizers)
        else:
            mask_model(pl_module, masks)
        for averaged_model in averaged_models_of(trainer, pl_module):
            mask_model(averaged_model, masks)
        return churn

    def _report(self, trainer: Trainer, pl_module: LightningModule, churn: float, *, restart: bool) -> None:
        """Log the masks as they are now; with ``restart``, reset checkpoint selection and early stopping."""
        masks = self._masks(pl_module)
        sparsity = zero_fraction(masks.values())
        dead = sum(zero_rows(weight.oriented(masks[weight.name])) for weight in self._weights if weight.name in masks)
        self.log_scalars(trainer, {"sparsity": sparsity, "churn": churn, "dead_filters": float(dead)})
        if restart:
            reset_monitoring(trainer)
        self.log_event(trainer, pl_module, f"sparsity {sparsity:.2f}, {plural(dead, 'dead filter')}")

    # Private.

    def _planned(self, pl_module: LightningModule) -> PruningPlan:
        return plan_pruning(type(self).__name__, pl_module, self.options, self._left_alone)

    def _watch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._step_hooks is not None:
            self._step_hooks.release()
        self._step_hooks = self._make_step_hooks(pl_module)
        self._step_hooks.watch(trainer.optimizers)

    def _refuse_overlap(self, trainer: Trainer) -> None:
        mine = {weight.name for weight in self._weights}
        for other in callbacks_of(trainer):
            if not isinstance(other, MaskingCallback) or other is self or other._run_plan is None:
                continue
            both = sorted(mine & {weight.name for weight in other._weights})
            if both:
                names = f"{type(other).__name__}` and `{type(self).__name__}"
                raise OrderError(
                    f"`{names}`: expected each weight to be masked by one callback, found {len(both)} that both mask: "
                    f"{both[:3]}. Give them `targets` that do not overlap."
                )
