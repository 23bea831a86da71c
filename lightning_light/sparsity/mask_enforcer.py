"""Keep masked weights at zero: weight, gradient and optimizer state, after every step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

__all__ = ["MaskEnforcer", "mask_model", "stepping"]

# With a zero weight, a zero gradient and zero state these leave all three at zero. Others are masked after each step.
_ELEMENTWISE = frozenset(
    {
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Adagrad,
        torch.optim.Adadelta,
        torch.optim.RMSprop,
        torch.optim.ASGD,
    }
)

Pairs = tuple[list[nn.Parameter], list[Tensor]]


class MaskEnforcer:
    """Multiplies by masks, which are held beside the network: its modules and state dict know nothing of them.

    Gradients are masked in ``on_before_optimizer_step``, so that clipping sees the true norm. For optimizers that
    treat each weight alone this is all; after the steps of others, and after steps that went past Lightning's hook,
    weights and state are masked as well.
    """

    def __init__(self) -> None:
        self.active = True  # False: only `apply` masks, and only weights
        self._masks: dict[nn.Parameter, Tensor] = {}
        self._pairs: dict[int, Pairs] = {}
        self._handles: list[RemovableHandle] = []
        self._masked: set[int] = set()

    def hold(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        """Keep ``masks`` (by parameter name) from now on, and no others; nothing is changed yet."""
        parameters = dict(model.named_parameters())
        self._masks = {parameters[name]: mask.to(parameters[name]) for name, mask in masks.items()}
        self._pairs = {}

    def watch(self, optimizers: Iterable[Optimizer]) -> None:
        """Look after each step of ``optimizers``."""
        self.release()
        self._handles = [optimizer.register_step_post_hook(self._after_step) for optimizer in optimizers]

    def release(self) -> None:
        """Leave no hook behind."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._masked = [], set()

    def before_step(self, optimizer: Optimizer) -> None:
        """Mask the gradients that ``optimizer`` is about to use."""
        if self.active and self._masks:
            _multiply_gradients(*self._of(optimizer))
            self._masked.add(id(optimizer))

    def apply(self, optimizers: Iterable[Optimizer]) -> None:
        """Make what the masks say true everywhere: when they have changed."""
        parameters, masks = list(self._masks), list(self._masks.values())
        _multiply(parameters, masks)
        if not self.active:
            return
        _multiply_gradients(parameters, masks)
        for optimizer in optimizers:
            _multiply_state(optimizer, *self._of(optimizer))

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        masked = id(optimizer) in self._masked
        self._masked.discard(id(optimizer))
        if not (self.active and self._masks) or (masked and type(optimizer) in _ELEMENTWISE):
            return
        parameters, masks = self._of(optimizer)
        _multiply(parameters, masks)
        _multiply_gradients(parameters, masks)
        _multiply_state(optimizer, parameters, masks)

    def _of(self, optimizer: Optimizer) -> Pairs:
        if id(optimizer) not in self._pairs:
            own = stepping(optimizer)
            found = [(parameter, mask) for parameter, mask in self._masks.items() if parameter in own]
            self._pairs[id(optimizer)] = [p for p, _ in found], [mask for _, mask in found]
        return self._pairs[id(optimizer)]


def stepping(optimizer: Optimizer) -> set[nn.Parameter]:
    """The parameters that ``optimizer`` moves."""
    return {parameter for group in optimizer.param_groups for parameter in group["params"]}


@torch.no_grad()
def mask_model(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Multiply the parameters of ``model`` by masks of the same names: an averaged copy, say."""
    for name, parameter in model.named_parameters():
        if name in masks:
            parameter.mul_(masks[name].to(parameter))


def _multiply(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    if tensors:
        with torch.no_grad():  # here alone: a decorator on each caller would cost more than the product
            torch._foreach_mul_(tensors, masks)  # type: ignore[call-overload]  # its stub knows tuples and lists only


def _multiply_gradients(parameters: list[nn.Parameter], masks: list[Tensor]) -> None:
    found = [gradient for parameter in parameters if (gradient := parameter.grad) is not None]
    if len(found) < len(parameters):
        masks = [mask for parameter, mask in zip(parameters, masks, strict=True) if parameter.grad is not None]
    _multiply(found, masks)


@torch.no_grad()
def _multiply_state(optimizer: Optimizer, parameters: list[nn.Parameter], masks: list[Tensor]) -> None:
    for parameter, mask in zip(parameters, masks, strict=True):
        for value in optimizer.state[parameter].values() if parameter in optimizer.state else ():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
                value.mul_(mask.to(value))
