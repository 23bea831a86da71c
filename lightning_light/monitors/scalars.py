"""Scalars for loggers: totals of the model, and one per quantity and layer."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lightning_light.measure.layer_table import LayerRow
from lightning_light.monitors.layer_matching import is_within
from lightning_light.monitors.snapshot import Snapshot

__all__ = ["PREFIX", "custom_layout", "layer_scalars", "total_scalars"]

PREFIX = "compression"


def total_scalars(now: Snapshot, before: Snapshot) -> dict[str, float]:
    """Return the totals of a model and their remaining fractions, under ``compression/<quantity>``."""
    totals = {"params": now.params, "bytes": now.bytes, "macs": now.macs}
    dense = {"params": before.params, "bytes": before.bytes, "macs": before.macs}
    scalars = {key: float(value) for key, value in totals.items() if value is not None}
    scalars |= {"sparsity": now.sparsity, "bits": now.bits, "dead_filters": float(now.dead_filters)}
    if now.effective_macs is not None:
        scalars["effective_macs"] = float(now.effective_macs)
    if now.deflated is not None:
        scalars["deflated_bytes"] = float(now.deflated)
    for key, value in totals.items():
        if value is not None and (had := dense[key]):
            scalars[f"{key}_remaining"] = value / had
    return {f"{PREFIX}/{key}": value for key, value in scalars.items()}


def layer_scalars(now: Snapshot, layers: Collection[str]) -> dict[str, float]:
    """Return one number per quantity and layer, under ``compression/<quantity>/<layer>``.

    Args:
        now: the model.
        layers: names of layers; modules that replaced a layer are below its name and reported under their own.
    """
    scalars: dict[str, float] = {}
    for row in now.rows:
        if is_within(row.name, layers):
            scalars |= {f"{PREFIX}/{key}/{row.name or 'model'}": value for key, value in _of_row(row, now).items()}
    for name, numbers in now.stats.items():
        if is_within(name, layers):
            scalars |= {f"{PREFIX}/{key}/{name}": value for key, value in numbers.items()}
    return scalars


def custom_layout(*, per_layer: bool) -> dict[str, dict[str, list[Any]]]:
    """Return a layout for TensorBoard's Custom Scalars: one chart of the totals, and one per quantity of all layers."""
    charts: dict[str, list[Any]] = {
        "remaining": ["Multiline", [rf"^{PREFIX}/(params|macs|bytes)_remaining$"]],
        "sparsity": ["Multiline", [rf"^{PREFIX}/sparsity$"]],
    }
    if per_layer:
        for title, key in _LAYER_CHARTS.items():
            charts[title] = ["Multiline", [rf"^{PREFIX}/{key}/"]]
    return {PREFIX: charts}


_LAYER_CHARTS = {
    "channels of each layer": "channels",
    "MACs of each layer": "macs",
    "parameters of each layer": "params",
    "sparsity of each layer": "sparsity",
    "bits of each layer": "bits",
}


def _of_row(row: LayerRow, now: Snapshot) -> dict[str, float]:
    scalars: dict[str, float] = {"params": float(row.params), "sparsity": row.sparsity, "bits": row.bits}
    if row.channels_out is not None:
        scalars["channels"] = float(row.channels_out)
    if now.macs is not None:
        scalars["macs"] = float(row.macs)
    return scalars
