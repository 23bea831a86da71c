"""Projectors: small layers from the student's features to the teacher's width, trained with the student.

They are not part of the LightningModule: not in its state dict, its averaged copies or DDP's buckets. Their weights are
in the method's state, so that checkpoints contain them, and they are trained by the student's optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypedDict

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_light.distillation.loss import pooled
from lightning_light.errors import UnsupportedError
from lightning_light.schema import Context, Rule, TensorOf, damage
from lightning_light.surgery.edit import cut
from lightning_light.surgery.optimizer import adopt, disown

__all__ = ["ProjectorState", "Projectors", "channel_source"]


class _Weight(Rule):
    """The weight of a 1x1 convolution, or of a linear layer."""

    @override
    def check(self, value: Tensor, context: Context, path: str) -> None:
        wanted = (1, 1) if context.holder.get("kind") == "conv" else ()
        if value.ndim < 2 or tuple(value.shape[2:]) != wanted or not value.numel():
            raise damage(path, f"shape {('outputs', 'inputs', *wanted)}", f"{tuple(value.shape)}")


class ProjectorState(TypedDict):
    """One projector in a checkpoint."""

    kind: Literal["conv", "linear", "positions"]
    source: str | None
    target: str | None
    weight: Annotated[Tensor, TensorOf(), _Weight()]


class Projectors:
    """All projectors of a run, by key; created when the first features are seen.

    Args:
        state: their weights, as part of the method's state, changed in place.
        optimizer: of the student; their parameters are added to its first group. None if there is none.
        seed: of their initial weights.
        like: a parameter of the student, whose device and type they take.
    """

    def __init__(self, state: dict[str, Any], optimizer: Any, seed: int, like: Tensor) -> None:
        self._state, self._optimizer, self._seed, self._like = state, optimizer, seed, like
        self.layers = nn.ModuleDict()
        for key, entry in state.items():
            outputs, inputs = entry["weight"].shape[:2]
            layer: Any = _layer(entry["kind"], inputs, outputs).to(like.device, like.dtype)
            with torch.no_grad():
                layer.weight.copy_(entry["weight"])
            self._own(key, layer, entry)

    def __call__(
        self, key: str, kind: str, student: Tensor, teacher: Tensor, source: str | None, target: str | None = None
    ) -> Tensor:
        """Project ``student`` to the width of ``teacher``.

        Args:
            key: of the projector; it is created at first use, and again if the width has changed without a call of
                `follow`.
            kind: ``"auto"``, ``"conv"``, ``"linear"`` or ``"none"``.
            student: features with their graph.
            teacher: the features that they are compared with.
            source: name of the tensor whose first dimension counts the student's channels, if known.
            target: the same for a teacher whose channels are removed along with the student's.
        """
        kind = {"auto": "conv" if student.ndim == 4 else "positions"}.get(kind, kind)
        if kind == "none":
            return student
        if kind == "linear" and student.ndim > 2:
            student = pooled(student)
        inputs = student.shape[1] if kind == "conv" else student.shape[-1]
        outputs = teacher.shape[-1] if kind == "positions" else teacher.shape[1 if teacher.ndim != 3 else -1]
        layer: Any = dict(self.layers).get(key)
        if layer is None or layer.weight.shape[:2] != (outputs, inputs):
            layer = self._make(key, inputs, outputs, {"kind": kind, "source": source, "target": target})
        projected: Tensor = layer(student)
        return projected

    def follow(self, kept: Mapping[str, Mapping[int, Tensor]]) -> None:
        """Remove the columns and rows of removed channels, and the optimizer's state of them.

        Args:
            kept: tensor name -> dimension -> positions that stayed.
        """
        for key, entry in self._state.items():
            layer: Any = self.layers[key]
            remaining = {dim: kept.get(entry[end], {}).get(0) for dim, end in ((1, "source"), (0, "target"))}
            fewer = {
                dim: where
                for dim, where in remaining.items()
                if where is not None and len(where) < layer.weight.shape[dim]
            }
            if fewer:
                cut(self.layers, {f"{key}.weight": fewer}, optimizers=[self._optimizer])
                entry["weight"] = layer.weight.detach()

    def parameters(self) -> Iterable[nn.Parameter]:
        """Parameters of all projectors."""
        return self.layers.parameters()

    def _make(self, key: str, inputs: int, outputs: int, entry: dict[str, Any]) -> nn.Module:
        if key in self.layers:
            disown([self._optimizer], self.layers[key].parameters())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed + len(self.layers))
            layer = _layer(entry["kind"], inputs, outputs).to(self._like.device, self._like.dtype)
        self._own(key, layer, entry)
        return layer

    def _own(self, key: str, layer: Any, entry: dict[str, Any]) -> None:
        if self._optimizer is None or isinstance(self._optimizer, torch.optim.LBFGS):
            raise UnsupportedError(
                f"`KnowledgeDistillation` with a projector and {type(self._optimizer).__name__}: expected an optimizer "
                "of the student that accepts parameters during a run, found none. Use `projector='none'`, or `AdamW`."
            )
        self.layers[key] = layer
        self._state[key] = {**entry, "weight": layer.weight.detach()}
        adopt(self._optimizer.param_groups[0], layer.weight, f"distillation.{key}.weight")


def channel_source(model: nn.Module, layer: str, width: int) -> str | None:
    """Name the tensor whose first dimension counts the output channels of ``layer``: the last one of that width."""
    end = [name for name, _ in model.named_modules() if name == layer or name.startswith(f"{layer}.")][-1]
    found = None
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim and len(weight) == width and "weight" in module._parameters:
            found = f"{path}.weight" if path else "weight"
        if path == end:
            break
    return found


def _layer(kind: str, inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 1, bias=False) if kind == "conv" else nn.Linear(inputs, outputs, bias=False)
