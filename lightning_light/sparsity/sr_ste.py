"""SR-STE: train dense weights through their masks, so that a mask can still change its mind."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_light.sparsity.mask_enforcer import stepping
from lightning_light.sparsity.patterns import NM
from lightning_light.sparsity.weights import Weight

__all__ = ["StraightThrough"]


class StraightThrough:
    """The network holds the masked weights at all times; the dense ones step in for the optimizer's step only.

    The gradient at the masked weights goes to the dense ones as it is (straight-through), with a decay of those that
    are masked: ``w <- w - lr * (g(mask * w) + decay * (1 - mask) * w)``, then the masks are chosen anew.

    Zhou et al., 2021, "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch".
    https://arxiv.org/abs/2102.04010
    """

    def __init__(self, pattern: NM, decay: float) -> None:
        self.pattern, self.decay = pattern, decay
        self._weights: list[Weight] = []
        self._masks: dict[str, Tensor] = {}
        self._dense: dict[str, Tensor] = {}
        self._inside: dict[int, list[Weight]] = {}
        self._handles: list[RemovableHandle] = []
        self._kept = pattern.n

    def watch(self, optimizers: Iterable[Optimizer]) -> None:
        """Look after each step of ``optimizers``."""
        self.release()
        self._handles = [optimizer.register_step_post_hook(self._after_step) for optimizer in optimizers]

    def release(self) -> None:
        """Leave no hook behind."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def hold(self, weights: list[Weight], masks: dict[str, Tensor], dense: dict[str, Tensor], kept: int) -> None:
        """Train ``dense`` through ``masks``: both are changed in place from now on; ``kept`` stay of each group."""
        self._weights, self._kept = weights, kept
        self._masks, self._dense = masks, dense
        with torch.no_grad():
            for weight in weights:
                weight.parameter.copy_(dense[weight.name] * masks[weight.name])

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """Let the dense weights, and their decay, meet the optimizer."""
        own = stepping(optimizer)
        learning = [weight for weight in self._weights if weight.parameter in own and weight.name in self._masks]
        mine = [weight for weight in learning if weight.parameter.grad is not None]
        for weight in mine:
            dense, mask = self._dense[weight.name], self._masks[weight.name]
            assert weight.parameter.grad is not None  # as chosen
            weight.parameter.grad.add_(dense * ~mask, alpha=self.decay)
            weight.parameter.copy_(dense)
        self._inside[id(optimizer)] = mine

    @torch.no_grad()
    def settle(self) -> None:
        """Put masked weights back where a step was announced and not taken: a gradient scaler may skip one."""
        for weight in [weight for mine in self._inside.values() for weight in mine]:
            weight.parameter.copy_(self._dense[weight.name] * self._masks[weight.name])
        self._inside.clear()

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for weight in self._inside.pop(id(optimizer), []):
            dense = self._dense[weight.name].copy_(weight.parameter)
            chosen = weight.facing(self.pattern.mask(weight.facing(dense.abs()), self._kept))
            weight.parameter.mul_(self._masks[weight.name].copy_(chosen))
