"""Measure MACs, parameters, size, latency, and sparsity."""

from lightning_light.measure.comparison import compression_table
from lightning_light.measure.cost import Cost, count_cost
from lightning_light.measure.history import History
from lightning_light.measure.latency import LatencyStats, measure_latency
from lightning_light.measure.layer_table import LayerRow, layer_table
from lightning_light.measure.size import deflated_bytes, file_bytes, tensor_bytes
from lightning_light.measure.snapshot import Snapshot, take_snapshot
from lightning_light.measure.sparsity_report import SparsityReport, measure_sparsity

__all__ = [
    "Cost",
    "History",
    "LatencyStats",
    "LayerRow",
    "Snapshot",
    "SparsityReport",
    "compression_table",
    "count_cost",
    "deflated_bytes",
    "file_bytes",
    "layer_table",
    "measure_latency",
    "measure_sparsity",
    "take_snapshot",
    "tensor_bytes",
]
