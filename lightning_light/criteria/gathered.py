"""Evidence that has been gathered, and what can be gathered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from lightning_light.criteria.evidence import Criterion, Evidence
from lightning_light.errors import UnsupportedError
from lightning_light.schema import TensorOf
from lightning_light.validation import NonNegativeInt, PositiveInt

__all__ = ["KINDS", "EvidenceStorage", "GateState", "Gathered"]

PARAMETER_KINDS = frozenset({"grad", "grad_squared", "movement"})
LAYER_KINDS = frozenset({"activation", "inputs", "input_absolute", "input_covariance"})
KINDS = PARAMETER_KINDS | LAYER_KINDS
"""What can be gathered.

By parameter name: ``"grad"`` (mean gradient), ``"grad_squared"`` (mean squared gradient, the empirical Fisher
information) and ``"movement"`` (accumulated over all optimizer steps by `Movement.accumulate`). By layer name:
``"activation"`` (mean absolute output, per channel), ``"inputs"`` (L2 norm of the inputs, per input channel),
``"input_absolute"`` and ``"input_covariance"`` (mean of ``|x|`` and of ``x x^T`` over all positions, shapes
``(groups, in)`` and ``(groups, in, in)``; for a convolution ``x`` is the patch under the kernel).

The inputs of an `nn.MultiheadAttention` called ``attn`` are under ``attn:query``, ``attn:key`` and ``attn:value``.
"""

ATTENTION_INPUTS = ("query", "key", "value")


class EvidenceSum(TypedDict):
    """A running sum and how much was added."""

    total: Annotated[Tensor, TensorOf()]
    count: Annotated[Tensor, TensorOf("real", 0, 0)]


class GateState(TypedDict):
    """What a `GateTrainer` keeps.

    Attributes:
        widths: group name -> number of gates.
        writers: tensors that are gated where channels are produced.
        logits: one per gate, group after group.
        mean: of the gradients, as Adam keeps it.
        square: of the gradients, as Adam keeps it.
        steps: number of steps that `mean` and `square` contain.
    """

    widths: dict[str, PositiveInt]
    writers: list[str]
    logits: Annotated[Tensor, TensorOf(ndim=1)]
    mean: Annotated[Tensor, TensorOf(ndim=1)]
    square: Annotated[Tensor, TensorOf(ndim=1, low=0)]
    steps: NonNegativeInt


class EvidenceStorage(TypedDict, total=False):
    """What an `EvidenceCollector` keeps in its storage, for the schema of a method's state.

    Attributes:
        batches: the number of batches that count.
        movement: parameter name -> movement.
        gates: of a `GateTrainer`.
    """

    batches: NonNegativeInt
    movement: dict[str, Annotated[Tensor, TensorOf()]]
    gates: GateState
    grad: dict[str, EvidenceSum]
    grad_squared: dict[str, EvidenceSum]
    activation: dict[str, EvidenceSum]
    inputs: dict[str, EvidenceSum]
    input_absolute: dict[str, EvidenceSum]
    input_covariance: dict[str, EvidenceSum]


Storage = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Gathered:
    """Evidence that has been gathered: kind -> name of a parameter or layer -> tensor.

    Attributes:
        tensors: the evidence; see `Evidence` for the shapes.
        batches: the number of batches it was gathered from.
    """

    tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    batches: int = 0

    def get(self, kind: str, name: str) -> Tensor | None:
        """Return the evidence ``kind`` of the parameter or layer ``name``, or None where nothing was gathered."""
        return self.tensors.get(kind, {}).get(name)

    def pieces(
        self, needs: Iterable[str], weight: Tensor, *, name: str, layer: str, module: nn.Module, dim: int = 0
    ) -> dict[str, Tensor]:
        """Return what `Evidence` takes for one tensor, with the axis ``dim`` in front, without what is missing.

        Args:
            needs: kinds of evidence; ``"generator"`` is left out.
            weight: the tensor in its own layout.
            name: of the tensor, as in ``named_parameters()``.
            layer: name of the module that uses it.
            module: that module.
            dim: the axis of ``weight`` that counts the channels.
        """
        found: dict[str, Tensor] = {}
        for kind in sorted(set(needs) - {"generator"}):
            if kind == "inputs":
                piece = _inputs_like(self.tensors.get(kind, {}), weight, name, layer, module)
            else:
                piece = self.get(kind, layer if kind == "activation" else name)
            if piece is not None and (kind != "activation" or piece.numel() == weight.shape[dim]):
                found[kind] = (piece if kind == "activation" else piece.movedim(dim, 0)).to(weight.device)
        return found

    def evidence(
        self,
        criterion: Criterion,
        weight: Tensor,
        *,
        name: str,
        layer: str,
        module: nn.Module,
        dim: int = 0,
        role: Literal["out", "in", "norm", "bias"] = "out",
        generator: torch.Generator | None = None,
    ) -> Evidence:
        """Return the evidence that ``criterion`` reads of one tensor, with the axis ``dim`` in front.

        For a layer that reads the channels, ``dim`` is its input axis. Arguments as in `pieces`.

        Raises:
            UnsupportedError: evidence is missing: the layer was not used, has no gradient, or its inputs cannot be
                read.
        """
        pieces = self.pieces(criterion.needs, weight, name=name, layer=layer, module=module, dim=dim)
        if missing := sorted(criterion.needs - {"generator"} - pieces.keys()):
            raise UnsupportedError(
                f"`criterion={criterion!r}` on `{name}`: expected {', '.join(missing)} from {self.batches} batches, "
                f"found none: no batch reached it, it is frozen, or `{type(module).__name__}` has no input that can be "
                f"read. Exclude the layer: `targets=Targets(exclude={layer!r})`."
            )
        return Evidence(weight.detach().movedim(dim, 0), role, generator=generator, **pieces)


def _inputs_like(
    inputs: Mapping[str, Tensor], weight: Tensor, name: str, layer: str, module: nn.Module
) -> Tensor | None:
    """The norms of the inputs in a shape that broadcasts to ``weight`` in its own layout."""
    if isinstance(module, nn.MultiheadAttention):
        return _attention_inputs(inputs, name.rpartition(".")[2], layer, weight)
    norms = inputs.get(layer)
    if norms is None or weight.ndim < 2:
        return None
    kernel = [1] * (weight.ndim - 2)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return norms.reshape(-1, 1, *kernel)
    groups = getattr(module, "groups", 1)
    if groups == 1:
        return norms.reshape(1, -1, *kernel)
    outputs = weight.shape[0] // groups
    return norms.reshape(groups, -1).repeat_interleave(outputs, dim=0).reshape(groups * outputs, -1, *kernel)


def _attention_inputs(inputs: Mapping[str, Tensor], own: str, layer: str, weight: Tensor) -> Tensor | None:
    """The same for a projection inside an attention; what the output projection reads is not known."""
    parts = {"q_proj_weight": "query", "k_proj_weight": "key", "v_proj_weight": "value"}
    if own in parts:
        norms = inputs.get(f"{layer}:{parts[own]}")
        return None if norms is None else norms.reshape(1, -1)
    found = [inputs.get(f"{layer}:{key}") for key in ATTENTION_INPUTS]
    if own != "in_proj_weight" or any(norms is None for norms in found):
        return None
    rows = weight.shape[0] // len(found)
    return torch.cat([norms.reshape(1, -1).expand(rows, -1) for norms in found if norms is not None])
