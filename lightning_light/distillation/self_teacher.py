"""The student as its own teacher: a copy as it was, a moving average, or what is trained along."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from lightning_light.distillation.feature_layers import part_of
from lightning_light.distillation.step_patch import Call, StudentHook
from lightning_light.distillation.teachers import Teacher
from lightning_light.surgery.attachment import attach
from lightning_light.surgery.manifest import KEY

__all__ = ["InModelTeacher", "copy_of_student", "move_towards"]


def copy_of_student(model: nn.Module, state: dict[str, Any], *, frozen: bool) -> nn.Module:
    """A copy of the LightningModule; in a resumed run with the weights, and if frozen the structure, of its start.

    Args:
        model: the LightningModule, brought to the structure of the checkpoint by now.
        state: of the method; remembers the copy.
        frozen: whether the copy keeps the structure it has; else it is cut along with the model.
    """
    saved = state.get("self")
    copied = copy.deepcopy(model)
    compression_state = attach(copied)
    compression_state.state = {}
    if saved is not None:
        if frozen:
            compression_state.load(copied, {"state_dict": saved["weights"], KEY: saved["manifest"]})
        copied.load_state_dict(saved["weights"])
    weights = {name: value for name, value in copied.state_dict().items() if torch.is_tensor(value)}
    state["self"] = {"weights": weights, **({"manifest": compression_state.manifest(copied)} if frozen else {})}
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


class InModelTeacher(Teacher):
    """A part of the LightningModule as a teacher, live: what it says while ``training_step`` runs is kept.

    Args:
        path: of the part; None for the student itself.
        pl_module: the LightningModule.
        student: path of the student; empty for the LightningModule.
    """

    def __init__(self, path: str | None, pl_module: nn.Module, student: str) -> None:
        self._path = student if path is None else path
        self._watch = None if path is None else StudentHook(path)
        self.prefix = f"{self._path}." if self._path else ""
        self.listen(pl_module)

    def listen(self, pl_module: nn.Module) -> None:
        """Find the part, as it is now."""
        self.root = self.module = part_of(pl_module, self._path, f"LiveTeacher({self._path!r})")
        if self._watch is not None:
            self._watch.listen(pl_module)

    def switch(self, on: bool) -> None:
        """Keep what it says from now on, or no longer."""
        if self._watch is not None:
            self._watch.on = on
            if on:
                self._watch.called.clear()

    def answer(self, student: Call) -> Any:
        """What it has said in this step.

        Args:
            student: the call of the student.
        """
        call = student if self._watch is None else self._watch.take()
        if call is None:
            raise ValueError(
                f"`LiveTeacher({self._path!r})`: expected `training_step` to call `{self._path}`, with gradients on, "
                "before the student's loss is known, found that it does not. Name a module that it calls."
            )
        return call.output

    @override
    def release(self) -> None:
        if self._watch is not None:
            self._watch.remove()
