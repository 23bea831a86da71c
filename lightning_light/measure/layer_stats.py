"""Collect per-layer numbers of the methods (rank, bits, error) from the compression state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["QUANTITIES", "layer_stats"]

QUANTITIES = ("rank", "energy_kept", "reconstruction_error", "coded_bits", "weight_bits", "activation_bits")
"""Rank of a layer's factors; fraction of the weight's energy that they keep; relative error of their product; bits per
weight in a coded file, codebook included; bits of the layer's weight and of its input in computations."""


def layer_stats(state: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Map layer -> quantity -> number, from the entry ``layers`` of each method's state.

    Args:
        state: `CompressionState.state`: method -> its state. Methods without such an entry are skipped.

    Example:
        >>> layer_stats({"low_rank": {"layers": {"conv": {"form": "channel", "rank": 8.0}}, "events": 1}})
        {'conv': {'rank': 8.0}}
    """
    stats: dict[str, dict[str, float]] = {}
    for kept in state.values():
        layers = kept.get("layers") if isinstance(kept, Mapping) else None
        for name, entry in layers.items() if isinstance(layers, Mapping) else ():
            found = {key: float(entry[key]) for key in QUANTITIES if isinstance(entry, Mapping) and key in entry}
            if found:
                stats.setdefault(name, {}).update(found)
    return stats
