"""What zeros are worth: how many there are, where whole filters have died, what a file of them weighs."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_light.example_input import ExampleInput
from lightning_light.measure.cost import count_cost
from lightning_light.measure.size import deflated_bytes, tensor_bytes
from lightning_light.sparsity.weights import Weight, find_weights
from lightning_light.targets import Targets

__all__ = ["LayerZeros", "Zeros", "measure_zeros", "zero_rows"]


@dataclass(frozen=True)
class LayerZeros:
    """One weight: its name, its size, the share of its zeros, and how many of its outputs have no weight left."""

    name: str
    params: int
    sparsity: float
    dead_filters: int
    filters: int


@dataclass(frozen=True)
class Zeros:
    """What the zeros of a network are worth.

    Attributes:
        layers: one row a weight of two or more axes.
        sparsity: share of zeros among those weights.
        dead_filters: outputs without weights, of all layers. `remove_dead_channels` takes out those it safely can.
        macs: multiply-accumulates of one sample's forward pass, dense; None if the network was not run.
        effective_macs: those whose weight is not zero. Only a kernel that skips zeros saves the rest.
        bytes: of the stored tensors; zeros count as any other value.
        deflated: bytes after lossless compression (DEFLATE): what a download or an app package takes.
    """

    layers: tuple[LayerZeros, ...]
    sparsity: float
    dead_filters: int
    macs: int | None
    effective_macs: int | None
    bytes: int
    deflated: int

    def scalars(self) -> dict[str, float]:
        """For a logger: the totals, and the sparsity of every weight."""
        found = {"sparsity": self.sparsity, "dead_filters": float(self.dead_filters),
                 "bytes": float(self.bytes), "deflated_bytes": float(self.deflated)}  # fmt: skip
        if self.effective_macs is not None:
            found["effective_macs"] = float(self.effective_macs)
        return found | {f"sparsity/{layer.name}": layer.sparsity for layer in self.layers}

    def summary(self) -> str:
        """One line."""
        macs = "" if self.macs is None else f", {self.effective_macs:,} of {self.macs:,} MACs have a weight"
        return (
            f"{self.sparsity:.2%} zeros, {self.dead_filters} dead filters{macs}; {self.bytes:,} bytes, "
            f"{self.deflated:,} after compression"
        )


def zero_rows(tensor: Tensor) -> int:
    """How many entries along the first axis hold nothing but zeros (or False)."""
    return int((tensor.reshape(len(tensor), -1) == 0).all(dim=1).sum())


@torch.no_grad()
def measure_zeros(model: nn.Module, example: ExampleInput | None = None) -> Zeros:
    """Count the zeros of ``model`` and what they save. The model stays as it is.

    Args:
        model: on any device.
        example: what it is called with; without it nothing is known of MACs.

    Example:
        >>> layer = nn.Linear(64, 64)
        >>> dense = measure_zeros(layer)
        >>> _ = layer.weight.data[:48].zero_()
        >>> sparse = measure_zeros(layer)
        >>> sparse.sparsity, sparse.dead_filters, sparse.deflated < 0.4 * dense.deflated
        (0.75, 48, True)
    """
    weights = find_weights(model, Targets(), "measure_zeros")
    rows = tuple(_row(weight) for weight in weights)
    total = sum(row.params for row in rows)
    macs = effective = None
    if example is not None:
        plain = copy.copy(example.to(model))
        samples = max(plain.samples, 1)
        cost = count_cost(model, plain.args, plain.kwargs)
        density: dict[str, float] = {}
        for weight, row in zip(weights, rows, strict=True):
            density.setdefault(weight.layer, 1.0 - row.sparsity)
        macs = cost.macs // samples
        kept = sum(count * density.get(name, 1.0) for name, count in cost.macs_by_module.items())
        effective = round(kept / samples)
    return Zeros(
        layers=rows,
        sparsity=sum(row.sparsity * row.params for row in rows) / max(total, 1),
        dead_filters=sum(row.dead_filters for row in rows),
        macs=macs,
        effective_macs=effective,
        bytes=tensor_bytes(model),
        deflated=deflated_bytes(model),
    )


def _row(weight: Weight) -> LayerZeros:
    facing = weight.facing(weight.parameter.detach())
    zeros = facing.numel() - int(facing.count_nonzero())
    return LayerZeros(weight.name, facing.numel(), zeros / facing.numel(), zero_rows(facing), len(facing))
