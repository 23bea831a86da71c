"""What methods know of single layers: plain numbers in a module's compression state, where a monitor finds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["QUANTITIES", "layer_stats"]

QUANTITIES = ("rank", "energy_kept", "reconstruction_error", "coded_bits", "weight_bits", "activation_bits")
"""Rank of a layer's factors; share of the weight's energy that they keep; relative error of their product; bits that a
weight takes in a coded file, codebook included; bits that the layer computes with: of its weight, of what it reads."""


def layer_stats(state: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Layer -> quantity -> number, from what every method keeps under ``layers`` in its part of the compression_state.

    Args:
        state: `CompressionState.state`: method -> its state. What has no entry per layer says nothing here.

    Example:
        >>> layer_stats({"low_rank": {"layers": {"conv": {"form": "channel", "rank": 8.0}}, "events": 1}})
        {'conv': {'rank': 8.0}}
    """
    facts: dict[str, dict[str, float]] = {}
    for kept in state.values():
        layers = kept.get("layers") if isinstance(kept, Mapping) else None
        for name, entry in layers.items() if isinstance(layers, Mapping) else ():
            found = {key: float(entry[key]) for key in QUANTITIES if isinstance(entry, Mapping) and key in entry}
            if found:
                facts.setdefault(name, {}).update(found)
    return facts
