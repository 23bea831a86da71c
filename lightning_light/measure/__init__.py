"""Measure: what a model costs, how large it is, how long it takes."""

from lightning_light.measure.cost import Cost, count_cost
from lightning_light.measure.latency import Latency, measure_latency
from lightning_light.measure.quiet import undisturbed
from lightning_light.measure.report import LayerRow, layer_table
from lightning_light.measure.size import deflated_bytes, file_bytes, tensor_bytes
from lightning_light.measure.worth import Zeros, measure_zeros

__all__ = [
    "Cost",
    "Latency",
    "LayerRow",
    "Zeros",
    "count_cost",
    "deflated_bytes",
    "file_bytes",
    "layer_table",
    "measure_latency",
    "measure_zeros",
    "tensor_bytes",
    "undisturbed",
]
