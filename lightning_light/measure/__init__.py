"""Measure: what a model costs, how large it is, how long it takes."""

from lightning_light.measure.cost import Cost, count_cost
from lightning_light.measure.latency import Latency, measure_latency
from lightning_light.measure.quiet import undisturbed
from lightning_light.measure.report import LayerRow, layer_table
from lightning_light.measure.size import deflated_bytes, file_bytes, tensor_bytes

__all__ = [
    "Cost",
    "Latency",
    "LayerRow",
    "count_cost",
    "deflated_bytes",
    "file_bytes",
    "layer_table",
    "measure_latency",
    "tensor_bytes",
    "undisturbed",
]
