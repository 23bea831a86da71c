"""Train dense weights through an N:M mask that is chosen again after every step (SR-STE)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from typing_extensions import override

from lightning_light.sparsity.mask_enforcer import StepHooks, parameters_of
from lightning_light.sparsity.patterns import NM
from lightning_light.sparsity.weights import MaskableWeight

__all__ = ["StraightThroughMasks"]


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
