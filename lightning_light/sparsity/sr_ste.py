"""`SRSTE`: train an N:M sparse network from scratch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_light.schedules import OneShot, Schedule, require_rising
from lightning_light.schema import LikeTensors, Needs
from lightning_light.sparsity.mask_enforcer import StepHooks, mask_model, parameters_of
from lightning_light.sparsity.mask_state import MaskState
from lightning_light.sparsity.masking import MaskingCallback
from lightning_light.sparsity.options import WeightPruningOptions
from lightning_light.sparsity.patterns import NM
from lightning_light.sparsity.weights import MaskableWeight
from lightning_light.surgery.averaged_models import averaged_models_of
from lightning_light.targets import TargetsLike
from lightning_light.timing import Events
from lightning_light.validation import NonNegativeFloat, validated

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["SRSTE", "StraightThroughMasks"]


class SRSTEState(MaskState, total=False):
    """What `SRSTE` keeps in the compression state; the dense weights are ``per_weight["dense"]``."""

    per_weight: Annotated[dict[str, Annotated[dict[str, Tensor], LikeTensors()]], Needs("masks", "fraction")]


@validated
@dataclass(eq=False, repr=False)
class SRSTE(MaskingCallback):
    """Train dense weights through N:M masks that are selected again by magnitude after every step.

    The network holds the masked weights at all times, except during the optimizer's step; the dense weights are in the
    compression state. Gradients and optimizer state are dense, so that a masked weight can return.

    Zhou et al., 2021, "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch" (sparse-refined
    straight-through estimator). https://arxiv.org/abs/2102.04010

    Example:
        >>> SRSTE(NM(2, 4), targets="encoder.*")
        SRSTE(targets='encoder.*')

    Args:
        pattern: weights kept of each group.
        decay: of masked weights; the paper has ``2e-4``. 0 is the plain straight-through estimator.
        schedule: progress -> fraction of the way to the pattern; rises only. Masks change until the end of the run.
        targets: layers whose weights may be masked: patterns or `Targets`.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an argument out of range, or a schedule that falls.
        TargetError: ``targets`` match nothing, or a layer that the pattern does not divide.
        OrderError: another callback masks one of the weights.
        UnsupportedError: a strategy that shards parameters.
    """

    method: ClassVar[str] = "sr_ste"
    state_schema: ClassVar[Any] = SRSTEState

    pattern: NM = NM(2, 4)
    _: KW_ONLY
    decay: NonNegativeFloat = 2e-4
    schedule: Schedule = OneShot()
    targets: TargetsLike = None

    def __post_init__(self) -> None:
        super().__init__(Events(self.schedule, every_n_steps=1))
        require_rising(type(self).__name__, self.schedule)
        self.options = WeightPruningOptions(pattern=self.pattern, targets=self.targets)

    # Lightning's hooks, in the order a run meets them.

    @override
    def _change_masks(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mask the first time, or keep fewer weights of each group, if that is due."""
        state = self.state(pl_module)
        fraction = max(self._fraction_due(trainer), state.get("fraction", 0.0))
        kept_before = self.pattern.kept_at(state.get("fraction", 0.0))
        if self.pattern.kept_at(fraction) < kept_before:
            self._prune(trainer, pl_module, fraction)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Mask the averaged copies as well, and undo a step that was prepared and not taken."""
        assert isinstance(self._step_hooks, StraightThroughMasks)  # since `on_fit_start`
        self._step_hooks.restore_skipped()
        self._mask_averaged_models(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mask the averaged copies, one of which may replace the network now."""
        self._mask_averaged_models(trainer, pl_module)
        super().on_train_end(trainer, pl_module)

    @override
    def window(self, max_epochs: int | None) -> tuple[float, float] | None:
        """From the first masks to the end of the run."""
        return self._events.window(max_epochs)[0], 1.0

    @override
    def last_change(self, max_epochs: int | None) -> float | None:
        return self._events.window(max_epochs)[1]

    # Private.

    @override
    def _no_effect_reason(self, pl_module: LightningModule) -> str | None:
        if self._masks(pl_module):
            return None
        return f"the run ended before the first change of the masks; `schedule={self.schedule!r}`."

    @override
    def _make_step_hooks(self, pl_module: LightningModule) -> StepHooks:
        return StraightThroughMasks(self._weights, self.pattern, self.decay, lambda: self.state(pl_module))

    def _prune(self, trainer: Trainer, pl_module: LightningModule, fraction: float) -> None:
        state = self.state(pl_module)
        dense = state.setdefault("per_weight", {}).setdefault("dense", {})
        for weight in self._weights:
            dense.setdefault(weight.name, weight.parameter.detach().clone())
        scores = {weight.name: weight.oriented(dense[weight.name].abs()) for weight in self._weights}
        churn = self._set_masks(trainer, pl_module, self._plan.masks(scores, fraction))
        state["fraction"] = fraction
        self._report(trainer, pl_module, churn, restart=churn > 0.0)

    def _mask_averaged_models(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for averaged_model in averaged_models_of(trainer, pl_module):
            mask_model(averaged_model, self._masks(pl_module))


class StraightThroughMasks(StepHooks):
    """Exchange the masked weights for the dense ones during each optimizer step.

    Between steps the network holds ``mask * w``. The gradient at the masked weights is passed to the dense ones
    unchanged (straight-through estimator), with a decay of the masked ones:
    ``w <- w - lr * (g(mask * w) + decay * (1 - mask) * w)``; then the masks are chosen again by magnitude.

    Args:
        weights: those with a mask.
        pattern: the N:M pattern.
        decay: of masked weights.
        state: returns the state, which owns ``masks``, the dense weights ``per_weight["dense"]``, and ``fraction``.
    """

    def __init__(
        self, weights: Sequence[MaskableWeight], pattern: NM, decay: float, state: Callable[[], dict[str, Any]]
    ) -> None:
        super().__init__()
        self._weights, self._pattern, self._decay, self._state = weights, pattern, decay, state
        self._exchanged: dict[int, list[MaskableWeight]] = {}

    @override
    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        state, own = self._state(), parameters_of(optimizer)
        dense = state.get("per_weight", {}).get("dense", {})
        masked = dense.keys() & state["masks"].keys()
        exchanged = [weight for weight in self._weights if weight.parameter in own and weight.name in masked]
        exchanged = [weight for weight in exchanged if weight.parameter.grad is not None]
        for weight in exchanged:
            assert weight.parameter.grad is not None  # as selected
            for tensors in (state["masks"], dense):  # a loaded checkpoint has them on the CPU
                tensors[weight.name] = tensors[weight.name].to(weight.parameter.device)
            mask = state["masks"][weight.name]
            weight.parameter.grad.add_(dense[weight.name] * ~mask, alpha=self._decay)
            weight.parameter.copy_(dense[weight.name])
        self._exchanged[id(optimizer)] = exchanged

    @override
    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        state = self._state()
        for weight in self._exchanged.pop(id(optimizer), []):
            dense = state["per_weight"]["dense"][weight.name].copy_(weight.parameter)
            scores = weight.oriented(dense.abs())
            mask = weight.oriented(self._pattern.mask(scores, self._pattern.kept_at(state["fraction"])))
            weight.parameter.mul_(state["masks"][weight.name].copy_(mask))

    @torch.no_grad()
    def restore_skipped(self) -> None:
        """Restore the masked weights where a step was prepared and not taken: a gradient scaler may skip one."""
        state = self._state()
        for weight in [weight for exchanged in self._exchanged.values() for weight in exchanged]:
            weight.parameter.copy_(state["per_weight"]["dense"][weight.name] * state["masks"][weight.name])
        self._exchanged.clear()
