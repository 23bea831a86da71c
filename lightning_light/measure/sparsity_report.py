"""What zeros are worth: where they are, the products they spare, and what a file of them weighs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightning_light.measure.cost import Cost, count_params
from lightning_light.measure.isolation import isolated
from lightning_light.measure.layer_table import LayerRow, effective_macs, layer_table, matrices
from lightning_light.measure.size import deflated_bytes, tensor_bytes
from lightning_light.measure.sparsity import zero_fraction

__all__ = ["SparsityReport", "measure_sparsity"]


@dataclass(frozen=True)
class SparsityReport:
    """What the zeros of a network are worth.

    Attributes:
        layers: one row a layer; ``zeros`` is its share, ``dead`` its outputs without a weight.
        sparsity: share of zeros among all weights of two or more axes.
        dead_filters: outputs without weights, of all layers. `remove_dead_channels` takes out those it safely can.
        macs: multiply-accumulates, dense; None if they were not counted.
        effective_macs: those whose weight is not zero. Only a kernel that skips zeros saves the rest.
        bytes: of the stored tensors; zeros count as any other value.
        deflated: bytes after lossless compression (DEFLATE): what a download or an app package takes.
    """

    layers: tuple[LayerRow, ...]
    sparsity: float
    dead_filters: int
    macs: int | None
    effective_macs: int | None
    bytes: int
    deflated: int


def measure_sparsity(model: nn.Module, cost: Cost | None = None) -> SparsityReport:
    """Count the zeros of ``model`` and what they save. The model stays as it is.

    Args:
        model: on any device.
        cost: from `count_cost` on the same model; without it nothing is known of MACs.

    Example:
        >>> layer = nn.Linear(64, 64)
        >>> dense = measure_sparsity(layer)
        >>> _ = layer.weight.data[:48].zero_()
        >>> sparse = measure_sparsity(layer)
        >>> sparse.sparsity, sparse.dead_filters, sparse.deflated < 0.4 * dense.deflated
        (0.75, 48, True)
    """
    with isolated(model):  # a parametrization may otherwise move on when its weight is read
        rows = tuple(layer_table(model, cost or count_params(model)))
        sparsity = zero_fraction(matrices(model))
    return SparsityReport(
        layers=rows,
        sparsity=sparsity,
        dead_filters=sum(row.dead for row in rows),
        macs=None if cost is None else cost.macs,
        effective_macs=None if cost is None else effective_macs(rows),
        bytes=tensor_bytes(model),
        deflated=deflated_bytes(model),
    )
