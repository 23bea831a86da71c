"""Scalars for loggers: totals of the model, what a schedule planned for them, and one per quantity and layer."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lightning_light.budgets import Budget
from lightning_light.measure import LayerRow, Snapshot
from lightning_light.schedules import Schedule, resolve
from lightning_light.targets import inside

__all__ = [
    "COSTS",
    "DETAILS",
    "LAYERS",
    "PREFIX",
    "custom_layout",
    "extra_scalars",
    "layer_scalars",
    "planned_scalars",
    "remaining_scalars",
    "total_scalars",
]

PREFIX = "compression"
"""Prefix of what describes the whole network."""

COSTS = frozenset(f"{PREFIX}/{key}" for key in ("macs", "params", "size"))
"""What is logged from the start; all else from its first change on."""

DETAILS = "compression_details"
"""Prefix of what only some methods change."""

LAYERS = "compression_layers"
"""Prefix of what describes one layer."""

_QUANTITIES = {"macs": "macs", "params": "params", "bytes": "size", "sparsity": "sparsity"}  # of budgets


def total_scalars(now: Snapshot) -> dict[str, float]:
    """Return MACs per sample, parameters, bytes as stored, sparsity and mean bits per weight of a model."""
    totals = {"macs": now.macs, "params": now.params, "size": now.bytes, "sparsity": now.sparsity, "bits": now.bits}
    return {f"{PREFIX}/{key}": float(value) for key, value in totals.items() if value is not None}


def remaining_scalars(now: Snapshot, before: Snapshot) -> dict[str, float]:
    """Return the remaining fractions of MACs, parameters and size."""
    pairs = {"macs": (now.macs, before.macs), "params": (now.params, before.params), "size": (now.bytes, before.bytes)}
    return {f"{PREFIX}/{key}_remaining": has / had for key, (has, had) in pairs.items() if has is not None and had}


def extra_scalars(now: Snapshot) -> dict[str, float]:
    """Return quantities that only some methods change: dead filters, MACs without zeros, size after DEFLATE."""
    effective = now.effective_macs if now.sparsity else None  # else the MACs themselves
    extras = {"dead_filters": now.dead_filters, "effective_macs": effective, "deflated_bytes": now.deflated}
    return {f"{DETAILS}/{key}": float(value) for key, value in extras.items() if value is not None}


def planned_scalars(
    callbacks: Iterable[object], dense: Mapping[str, float], progress: float, max_epochs: int | None
) -> dict[str, float]:
    """Return the values that budgets and schedules plan for now, under ``compression/<quantity>_planned``.

    Args:
        callbacks: those with a `Budget` as ``budget`` and a `Schedule` as ``schedule`` count.
        dense: quantity of a budget -> its value before any method changed the network.
        progress: of the run, in [0, 1].
        max_epochs: the Trainer's.
    """
    planned: dict[str, float] = {}
    for callback in callbacks:
        budget, schedule = getattr(callback, "budget", None), getattr(callback, "schedule", None)
        if not (isinstance(budget, Budget) and isinstance(schedule, Schedule) and budget.quantity in _QUANTITIES):
            continue
        start = 0.0 if budget.quantity == "sparsity" else dense.get(budget.quantity)
        if start is not None:
            key = f"{PREFIX}/{_QUANTITIES[budget.quantity]}_planned"
            value = budget.at(start, resolve(schedule, max_epochs)(progress))
            further = max if budget.goal(start) > start else min  # of two methods, the one that goes further
            planned[key] = further(planned.get(key, value), value)
    return planned


def layer_scalars(now: Snapshot, layers: Collection[str]) -> dict[str, float]:
    """Return one number per quantity and layer, under ``compression_layers/<quantity>/<layer>``.

    Args:
        now: the model.
        layers: names of layers; modules that replaced a layer are below its name and reported under their own.
    """
    scalars: dict[str, float] = {}
    for row in now.rows:
        if inside(row.name, layers):
            scalars |= {f"{LAYERS}/{key}/{row.name or 'model'}": value for key, value in _of_row(row, now).items()}
    for name, numbers in now.stats.items():
        if inside(name, layers):
            scalars |= {f"{LAYERS}/{key}/{name}": value for key, value in numbers.items() if key != "weight_bits"}
    return scalars


def custom_layout(tags: Collection[str]) -> dict[str, dict[str, list[Any]]]:
    """Return a layout for TensorBoard's Custom Scalars: the charts of which a curve is among ``tags``."""
    shown = [title for title, pattern in _CHARTS.items() if any(re.search(pattern, tag) for tag in tags)]
    return {"Compression": {title: ["Multiline", [_CHARTS[title]]] for title in shown}}


_CHARTS = {
    "MACs: reached and planned": rf"^{PREFIX}/macs(_planned)?$",
    "Parameters: reached and planned": rf"^{PREFIX}/params(_planned)?$",
    "Stored size in bytes: reached and planned": rf"^{PREFIX}/size(_planned)?$",
    "Sparsity: reached and planned": rf"^{PREFIX}/sparsity(_planned)?$",
    "Bits per weight": rf"^{PREFIX}/bits$",
    "Output channels per layer": rf"^{LAYERS}/channels/",
    "MACs per layer": rf"^{LAYERS}/macs/",
    "Parameters per layer": rf"^{LAYERS}/params/",
    "Sparsity per layer": rf"^{LAYERS}/sparsity/",
    "Bits per weight per layer": rf"^{LAYERS}/bits/",
    "Rank per layer": rf"^{LAYERS}/rank/",
}


def _of_row(row: LayerRow, now: Snapshot) -> dict[str, float]:
    scalars: dict[str, float] = {"params": float(row.params), "sparsity": row.sparsity, "bits": row.bits}
    if row.channels_out is not None:
        scalars["channels"] = float(row.channels_out)
    if now.macs is not None:
        scalars["macs"] = float(row.macs)
    return scalars
