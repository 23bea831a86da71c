"""What the callbacks of this wing share: masks in the compression state, kept at zero, that follow the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_light.callback import CompressionCallback
from lightning_light.errors import OrderError, UnsupportedError
from lightning_light.measure.sparsity import mask_churn, zero_fraction, zero_rows
from lightning_light.order import Stage
from lightning_light.progress import steps_done
from lightning_light.sparsity.mask_enforcer import MaskEnforcer, mask_model
from lightning_light.sparsity.weights import Weight, find_weights
from lightning_light.surgery.averaged_models import averaged_models_of
from lightning_light.surgery.checkpoint_monitoring import reset_monitoring
from lightning_light.surgery.distributed import broadcast, log_rank_zero
from lightning_light.surgery.edit import take
from lightning_light.targets import Targets, as_targets

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import nn
    from torch.optim import Optimizer

__all__ = ["MaskingCallback"]


class MaskingCallback(CompressionCallback):
    """Base of the masking methods: masks live in the compression state, never in the user's ``state_dict``."""

    stage: ClassVar[int] = Stage.MASKS
    structural: ClassVar[bool] = False

    targets: Targets | str | list[str] | None

    def __init__(self) -> None:
        self._enforcer = MaskEnforcer()
        self._held: Mapping[str, Tensor] | None = None
        self._weights: list[Weight] = []
        self._finished = False  # the last change of the masks that are held is behind: nothing is asked any more

    # Lightning's hooks, in the order a run meets them.

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies that hold other tensors than the module's parameters."""
        super().setup(trainer, pl_module, stage)
        strategy = trainer.strategy
        if strategy.restore_checkpoint_after_setup or not strategy.lightning_restore_optimizer:
            raise UnsupportedError(
                f"`{type(self).__name__}` with `{type(strategy).__name__}`: expected a strategy that leaves parameters "
                "whole (one device, or 'ddp'), found one that shards or copies them, past which masks would not hold. "
                "Prune on one device or with `strategy='ddp'`."
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the weights as they are now; go on with the masks of a checkpoint, or of an earlier fit."""
        super().on_fit_start(trainer, pl_module)
        self._weights = self._find(pl_module)
        self._refuse_overlap(trainer, pl_module)
        self._check_weights(pl_module)
        state = self.state(pl_module)
        if not self.resumed(pl_module):
            masks = _still_true(pl_module, state.get("masks", {}))
            state.clear()
            state["masks"] = masks
        self._held = None
        self._hold(pl_module)
        self._enforcer.watch(trainer.optimizers)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Gather from the dense gradients, accumulated, reduced and unscaled as they are here; then mask them."""
        self._gather(trainer, self._hold(pl_module), optimizer)
        self._enforcer.before_step(optimizer)

    @override
    def on_surgery(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        kept: Mapping[str, Mapping[int, Tensor]] | None,
    ) -> None:
        """Cut what belongs to a weight along with the weight; forget what belongs to one that is gone."""
        shapes = {name: parameter.shape for name, parameter in pl_module.named_parameters()}
        state = self.state(pl_module)
        for key in self._cut_along(state):
            holder, last = key
            entries = {
                name: take(tensor, {dim: stays.long() for dim, stays in (kept or {}).get(name, {}).items()})
                for name, tensor in holder[last].items()
            }
            holder[last] = {
                name: t
                for name, t in entries.items()
                if shapes.get(name, t.shape) == t.shape and (name in shapes or key[1] == "origin")
            }
        self._weights = [weight for weight in self._find(pl_module) if weight.name in shapes]
        self._held = None
        self._hold(pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so, if there are no zeros."""
        reason = None if getattr(trainer, "fast_dev_run", False) else self._why_nothing(trainer, pl_module)
        if reason is not None:
            self._no_effect(reason)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind, and no reference to the network."""
        self._enforcer.release()
        self._enforcer = MaskEnforcer()
        self._held, self._weights = None, []
        super().teardown(trainer, pl_module, stage)

    # For the two callbacks.

    def _find(self, pl_module: nn.Module) -> list[Weight]:
        return find_weights(pl_module, as_targets(self.targets), type(self).__name__)

    def _check_weights(self, pl_module: LightningModule) -> None:
        """Refuse weights that the method cannot mask."""

    def _gather(self, trainer: Trainer, state: dict[str, Any], optimizer: Optimizer) -> None:
        """Keep what the next change needs of the gradients that ``optimizer`` is about to use, not yet clipped."""
        raise NotImplementedError

    def _why_nothing(self, trainer: Trainer, pl_module: LightningModule) -> str | None:
        """Why nothing was masked, or None."""
        raise NotImplementedError

    def _cut_along(self, state: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
        """Where in the state there are tensors by weight name, in the weights' shapes."""
        return [(state, key) for key in ("masks", "movement", "dense", "shadow", "origin") if key in state]

    def _hold(self, pl_module: LightningModule) -> dict[str, Any]:
        """The state; its masks are taken up if they are others: a checkpoint may have been loaded."""
        state = self.state(pl_module)
        masks = state.setdefault("masks", {})
        if masks is not self._held:
            self._enforcer.hold(pl_module, masks)
            self._held, self._finished = masks, False
        return state

    def _change(self, trainer: Trainer, pl_module: LightningModule, masks: dict[str, Tensor]) -> float:
        """Take up other masks, everywhere. Returns the share of mask entries that have changed."""
        if trainer.world_size > 1:
            masks = broadcast(trainer, {name: mask.cpu() for name, mask in masks.items()})
        state = self.state(pl_module)
        devices = {weight.name: weight.parameter.device for weight in self._weights}
        masks = {name: mask.to(devices[name]) for name, mask in masks.items()}
        churn = mask_churn(state["masks"], masks)
        state["masks"] = masks
        self._hold(pl_module)
        self._enforcer.apply(trainer.optimizers)
        for copy in averaged_models_of(trainer, pl_module):
            mask_model(copy, masks)
        return churn

    def _announce(self, trainer: Trainer, pl_module: LightningModule, churn: float, *, restart: bool) -> None:
        """Log what the masks are now; with other zeros, look for the best checkpoint anew."""
        masks = self.state(pl_module)["masks"]
        sparsity = zero_fraction(masks.values())
        dead = sum(zero_rows(weight.facing(masks[weight.name])) for weight in self._weights if weight.name in masks)
        for logger in trainer.loggers:
            named = {"sparsity": sparsity, "churn": churn, "dead_filters": float(dead)}
            logger.log_metrics(
                {f"{type(self).method}/{key}": value for key, value in named.items()}, step=steps_done(trainer)
            )
        if restart:
            reset_monitoring(trainer)
        log_rank_zero(
            trainer,
            f"{type(self).method}: sparsity {sparsity:.4f}, {churn:.4f} of the masks changed, {dead} dead filters",
        )

    def _refuse_overlap(self, trainer: Trainer, pl_module: LightningModule) -> None:
        mine = {weight.name for weight in self._weights}
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        for other in callbacks:
            if not isinstance(other, MaskingCallback) or other is self:
                continue
            both = sorted(mine & {weight.name for weight in other._find(pl_module)})
            if both:
                names = f"{type(self).__name__}` and `{type(other).__name__}"
                raise OrderError(
                    f"`{names}`: expected each weight to be masked by one callback, found {len(both)} that both mask: "
                    f"{both[:3]}. Give them `targets` that do not overlap."
                )


def _still_true(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of an earlier fit under which the weights are still zero."""
    parameters = dict(model.named_parameters())
    return {
        name: mask
        for name, mask in masks.items()
        if name in parameters
        and parameters[name].shape == mask.shape
        and not torch.count_nonzero(parameters[name].detach()[~mask.to(parameters[name].device)])
    }
