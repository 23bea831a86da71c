"""Report sparsity: zeros per layer, dead filters, effective MACs, and compressed size."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from typing_extensions import override

from lightning_light.formatting import DataTable, Tabular, human_bytes, human_count, human_percent
from lightning_light.isolation import isolated
from lightning_light.measure.cost import Cost, count_params
from lightning_light.measure.layer_table import LayerRow, effective_macs, layer_table, weight_matrices
from lightning_light.measure.size import deflated_bytes, tensor_bytes
from lightning_light.measure.sparsity import zero_fraction
from lightning_light.validation import validated

__all__ = ["SparsityReport", "measure_sparsity"]


@dataclass(frozen=True)
class SparsityReport(Tabular):
    """The sparsity of a network and what it saves.

    Attributes:
        layers: one row per layer.
        sparsity: fraction of zeros among all weights of two or more dimensions.
        dead_filters: outputs whose weights are all zero, of all layers. `remove_dead_channels` removes those it can.
        macs: MACs of the dense network; None if they were not counted.
        effective_macs: MACs whose weight is nonzero. Only kernels that skip zeros save the rest.
        bytes: of parameters and persistent buffers; zeros count as any other value.
        deflated: bytes after lossless compression (DEFLATE), as in a download or an app package.
    """

    layers: tuple[LayerRow, ...]
    sparsity: float
    dead_filters: int
    macs: int | None
    effective_macs: int | None
    bytes: int
    deflated: int

    def table(self) -> DataTable:
        """Return a table of every layer."""
        lines = tuple(
            (row.name, human_percent(row.sparsity), str(row.dead_filters), human_count(row.params))
            for row in self.layers
        )
        total = ("total", human_percent(self.sparsity), str(self.dead_filters), "")
        size = f"{human_bytes(self.bytes)}, {human_bytes(self.deflated)} after compression (DEFLATE)"
        return DataTable(("layer", "sparsity", "dead filters", "params"), lines, totals=(total,), notes=(size,))

    @override
    def tables(self) -> list[DataTable]:
        """Return one line per layer."""
        return [self.table()]


@validated
def measure_sparsity(model: nn.Module, cost: Cost | None = None) -> SparsityReport:
    """Measure the sparsity of ``model`` and what it saves.

    Args:
        model: on any device.
        cost: from `count_cost` on the same model; without it MACs are not reported.

    Example:
        >>> layer = nn.Linear(64, 64)
        >>> dense = measure_sparsity(layer)
        >>> _ = layer.weight.data[:48].zero_()
        >>> sparse = measure_sparsity(layer)
        >>> sparse.sparsity, sparse.dead_filters, sparse.deflated < 0.4 * dense.deflated
        (0.75, 48, True)
    """
    with isolated(model):  # reading a parametrized weight may change its state
        rows = tuple(layer_table(model, cost or count_params(model)))
        sparsity = zero_fraction(weight_matrices(model))
    return SparsityReport(
        layers=rows,
        sparsity=sparsity,
        dead_filters=sum(row.dead_filters for row in rows),
        macs=None if cost is None else cost.macs,
        effective_macs=None if cost is None else effective_macs(rows),
        bytes=tensor_bytes(model),
        deflated=deflated_bytes(model),
    )
