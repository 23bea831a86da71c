"""Keep masked weights at zero: weight, gradient and optimizer state, after every step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop
from typing_extensions import override

from lightning_light.sparsity.weights import MaskableWeight

__all__ = ["MaskEnforcer", "StepHooks", "mask_model", "parameters_of"]

# With a zero weight, a zero gradient and zero state these leave all three at zero. Others are masked after each step.
_ELEMENTWISE = frozenset({SGD, Adam, AdamW, NAdam, RAdam, Adagrad, Adadelta, RMSprop, ASGD})

Pairs = tuple[list[nn.Parameter], list[Tensor]]


class StepHooks(ABC):
    """Act before and after every step of an optimizer.

    `before_step` is called from Lightning's ``on_before_optimizer_step``, `after_step` by the optimizer itself, also
    where user code bypasses Lightning's hook.
    """

    def __init__(self) -> None:
        self._hooks = ExitStack()

    def watch(self, optimizers: Iterable[Optimizer]) -> None:
        """Call `after_step` after each step of ``optimizers``."""
        self.release()
        for optimizer in optimizers:
            self._hooks.enter_context(optimizer.register_step_post_hook(self._called))

    def release(self) -> None:
        """Remove the hooks."""
        self._hooks.close()

    @abstractmethod
    def before_step(self, optimizer: Optimizer) -> None:
        """Prepare gradients and weights for a step of ``optimizer``."""

    @abstractmethod
    def after_step(self, optimizer: Optimizer) -> None:
        """Mask the weights after a step of ``optimizer``."""

    def _called(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.after_step(optimizer)


class MaskEnforcer(StepHooks):
    """Multiply weights, gradients and optimizer state by the masks of the compression state.

    Gradients are masked before the step, so that gradient clipping uses the norm of what remains. This is sufficient
    for optimizers that treat each weight alone; after the steps of others, and after steps that bypassed Lightning's
    hook, weights and state are masked as well.

    Args:
        weights: those that may have a mask.
        masks: returns the current masks by weight name. It is called at every step: the compression state is their
            only owner, and may be replaced when a checkpoint is loaded.
    """

    def __init__(self, weights: Sequence[MaskableWeight], masks: Callable[[], Mapping[str, Tensor]]) -> None:
        super().__init__()
        self._weights, self._masks = weights, masks
        self._stepped: dict[int, list[MaskableWeight]] = {}
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        self._prepared: set[int] = set()

    def apply(self, optimizers: Iterable[Optimizer]) -> None:
        """Mask everything once, after the masks have changed."""
        parameters, factors = self._pairs(self._weights)
        _multiply(parameters, factors)
        _multiply_gradients(parameters, factors)
        for optimizer in optimizers:
            _multiply_state(optimizer, *self._pairs_of(optimizer))

    @override
    def before_step(self, optimizer: Optimizer) -> None:
        _multiply_gradients(*self._pairs_of(optimizer))
        self._prepared.add(id(optimizer))

    @override
    def after_step(self, optimizer: Optimizer) -> None:
        prepared = id(optimizer) in self._prepared
        self._prepared.discard(id(optimizer))
        if prepared and type(optimizer) in _ELEMENTWISE:
            return
        parameters, factors = self._pairs_of(optimizer)
        _multiply(parameters, factors)
        _multiply_gradients(parameters, factors)
        _multiply_state(optimizer, parameters, factors)

    def _pairs_of(self, optimizer: Optimizer) -> Pairs:
        if id(optimizer) not in self._stepped:
            own = parameters_of(optimizer)
            self._stepped[id(optimizer)] = [weight for weight in self._weights if weight.parameter in own]
        return self._pairs(self._stepped[id(optimizer)])

    def _pairs(self, weights: Iterable[MaskableWeight]) -> Pairs:
        masks = self._masks()
        masked = [weight for weight in weights if weight.name in masks] if masks else []
        return [weight.parameter for weight in masked], [self._factor(weight, masks[weight.name]) for weight in masked]

    def _factor(self, weight: MaskableWeight, mask: Tensor) -> Tensor:
        """Cast ``mask`` to the weight's type; cached, since the product with a boolean takes ten times as long."""
        cached = self._factors.get(weight.name)
        if cached is None or cached[0] is not mask:
            cached = self._factors[weight.name] = (mask, mask.to(weight.parameter))
        return cached[1]


def parameters_of(optimizer: Optimizer) -> set[nn.Parameter]:
    """Return the parameters that ``optimizer`` updates."""
    return {parameter for group in optimizer.param_groups for parameter in group["params"]}


@torch.no_grad()
def mask_model(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Multiply the parameters of ``model``, for instance an averaged copy, by the masks of the same names."""
    for name, parameter in model.named_parameters():
        if name in masks:
            parameter.mul_(masks[name].to(parameter))


def _multiply(tensors: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    if tensors:
        with torch.no_grad():  # here alone: a decorator on each caller would cost more than the product
            torch._foreach_mul_(tensors, factors)  # type: ignore[call-overload]  # its stub knows tuples and lists only


def _multiply_gradients(parameters: list[nn.Parameter], factors: list[Tensor]) -> None:
    found = [gradient for parameter in parameters if (gradient := parameter.grad) is not None]
    if len(found) < len(parameters):
        pairs = zip(parameters, factors, strict=True)
        factors = [factor for parameter, factor in pairs if parameter.grad is not None]
    _multiply(found, factors)


@torch.no_grad()
def _multiply_state(optimizer: Optimizer, parameters: list[nn.Parameter], factors: list[Tensor]) -> None:
    for parameter, factor in zip(parameters, factors, strict=True):
        for value in optimizer.state[parameter].values() if parameter in optimizer.state else ():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
                value.mul_(factor.to(value))
