"""Tracing rules: what each ATen operation does to channels, with one file per kind of operation.

View operations (view, slice, cat, ...) are carried out on the labels themselves. An operation without a rule protects
every channel that reaches it, so it can cost compression, never correctness.
"""

from lightning_light.dependency.rules import foreach, indexing, layers, products, views
from lightning_light.dependency.rules.table import RULES, elementwise, operands, outputs_of, unknown

__all__ = [
    "RULES",
    "elementwise",
    "foreach",
    "indexing",
    "layers",
    "operands",
    "outputs_of",
    "products",
    "unknown",
    "views",
]
