"""Copy the student as its own teacher, and keep a moving average of its weights."""

from __future__ import annotations

from typing import Annotated, Any, TypedDict

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_light.capture import has_lazy_layers
from lightning_light.copies import copy_network
from lightning_light.errors import UnsupportedError
from lightning_light.schema import Context, Rule, damage
from lightning_light.surgery.attachment import attach
from lightning_light.surgery.manifest import KEY, Manifest

__all__ = ["SelfTeacherState", "copy_of_student", "update_average"]


def copy_of_student(model: nn.Module, state: dict[str, Any], *, frozen: bool) -> nn.Module:
    """Copy the LightningModule; in a resumed run with the weights, and if frozen the structure, of the run's start.

    Args:
        model: the LightningModule, already restored to the structure of the checkpoint.
        state: of the method; stores the copy's weights.
        frozen: whether the copy keeps its structure; else it is pruned along with the model.

    Raises:
        UnsupportedError: a layer has no shape before its first forward pass.
    """
    if has_lazy_layers(model):
        raise UnsupportedError(
            f"`SelfTeacher` on `{type(model).__name__}`: expected layers whose shapes are known, found lazy ones: no "
            "copy can teach before the first forward pass. Call the module once before `trainer.fit`."
        )
    saved = state.get("self")
    copied = copy_network(model)
    compression_state = attach(copied)
    compression_state.state = {}
    if saved is not None:
        if frozen:
            compression_state.load(copied, {"state_dict": saved["weights"], KEY: saved["manifest"]})
        try:
            copied.load_state_dict(saved["weights"])
        except RuntimeError as error:
            raise damage("state['distillation']['self']", "the weights of the teacher", str(error)) from error
    weights = {name: value for name, value in copied.state_dict().items() if torch.is_tensor(value)}
    state["self"] = {"weights": weights, **({"manifest": compression_state.manifest(copied)} if frozen else {})}
    return copied.requires_grad_(False)


class _SoundManifest(Rule):
    """What `Manifest.encode` has written."""

    @override
    def check(self, value: Any, context: Context, path: str) -> None:
        Manifest.decode(value)


class SelfTeacherState(TypedDict, total=False):
    """Weights of a self-teacher and, if it is frozen, the structure that they belong to."""

    weights: dict[str, Tensor]
    manifest: Annotated[dict[str, Any], _SoundManifest()]


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move every weight of ``average`` by ``1 - decay`` towards that of ``model``; buffers are copied."""
    live = dict(model.named_parameters())
    for name, parameter in average.named_parameters():
        parameter.lerp_(live[name].detach().to(parameter), 1.0 - decay)
    buffers = dict(model.named_buffers())
    for name, buffer in average.named_buffers():
        buffer.copy_(buffers[name])
