"""The student as its own teacher: a copy as it was, or a moving average."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from lightning_light.surgery.journal import attach
from lightning_light.surgery.manifest import KEY

__all__ = ["copy_of_student", "move_towards"]


def copy_of_student(model: nn.Module, state: dict[str, Any], *, frozen: bool) -> nn.Module:
    """A copy of the LightningModule; in a resumed run with the weights, and if frozen the structure, of its start.

    Args:
        model: the LightningModule, brought to the structure of the checkpoint by now.
        state: of the method; remembers the copy.
        frozen: whether the copy keeps the structure it has; else it is cut along with the model.
    """
    saved = state.get("self")
    copied = copy.deepcopy(model)
    ledger = attach(copied)
    ledger.state = {}
    if saved is not None:
        if frozen:
            ledger.load(copied, {"state_dict": saved["weights"], KEY: saved["manifest"]})
        copied.load_state_dict(saved["weights"])
    weights = {name: value for name, value in copied.state_dict().items() if torch.is_tensor(value)}
    state["self"] = {"weights": weights, **({"manifest": ledger.manifest(copied)} if frozen else {})}
    return copied.requires_grad_(False)


@torch.no_grad()
def move_towards(average: nn.Module, model: nn.Module, share: float) -> None:
    """Move every weight of ``average`` by ``share`` of the way to ``model``'s; buffers are copied."""
    live = dict(model.named_parameters())
    for name, parameter in average.named_parameters():
        parameter.lerp_(live[name].detach().to(parameter), share)
    buffers = dict(model.named_buffers())
    for name, buffer in average.named_buffers():
        buffer.copy_(buffers[name])
