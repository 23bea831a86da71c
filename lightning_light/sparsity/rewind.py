"""Rewinding: store the weights of an early step, and reset the network to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_light.schedules import Schedule, resolve
from lightning_light.sparsity.mask_schedules import Rewinding

__all__ = ["check_rewinding", "rewind_weights", "store_weights"]


def check_rewinding(schedule: Schedule, max_epochs: int | None) -> None:
    """Refuse to rewind to a moment after the first rise, and at the end of the run, after which nothing is trained.

    Raises:
        ValueError: ``rewind_to`` is not before the first rise, or the last one is at the end of the run.
    """
    if not isinstance(schedule, Rewinding):
        return
    placed = resolve(schedule, max_epochs)
    first, last = placed.span()
    first = min((change for change in placed.changes() or () if placed(change) > 0.0), default=first)
    if last >= 1.0:
        raise ValueError(
            f"`{schedule!r}`: expected the last rise before the end of the run, found it there: the ticket would not "
            "be trained. Write for instance `Rewinding(Window(Staircase(Exponential(2.3), steps=5), end=0.8))`."
        )
    if schedule.rewind_to >= first:
        raise ValueError(
            f"`{schedule!r}`: expected `rewind_to` before the first rise of the schedule, at {first:.3g} of the "
            f"run, found {schedule.rewind_to}. Start the schedule later, or rewind to an earlier moment."
        )


def store_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copy the trainable parameters and the floating point buffers (running statistics) of the state dict."""
    stored = model.state_dict()
    parameters = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    buffers = {name: b.clone() for name, b in model.named_buffers() if name in stored and b.is_floating_point()}
    return parameters | buffers


@torch.no_grad()
def rewind_weights(
    model: nn.Module, origin: Mapping[str, Tensor], masks: Mapping[str, Tensor], optimizers: Iterable[Optimizer]
) -> None:
    """Reset ``model`` to ``origin`` under ``masks``, and the state of the optimizers to zero."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in origin:
            value = origin[name].to(tensor)
            tensor.copy_(value * masks[name].to(tensor) if name in masks else value)
    for optimizer in optimizers:
        for state in optimizer.state.values():
            for key, value in state.items():
                state[key] = value.zero_() if isinstance(value, Tensor) else 0 if isinstance(value, int) else value
