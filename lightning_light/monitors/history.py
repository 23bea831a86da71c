"""How a model shrank: one column a moment at which something was different from the moment before."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightning_light.monitors.layer_matching import belongs, match_layers, remaining
from lightning_light.monitors.snapshot import Snapshot

__all__ = ["History"]

_MOST_COLUMNS = 256  # more than a picture can show


@dataclass(frozen=True)
class History:
    """What remains of each layer over time, as shares of what it was.

    Attributes:
        layers: names, in the model's order.
        steps: when each column begins.
        channels: a column a moment: for each layer, the share of its output channels that is left.
        weights: the same of its parameters that are not zero.
        totals: what remains of the whole model in each column: ``params``, ``bytes``, ``macs`` (if known).
        end: the last step that was looked at.
    """

    layers: tuple[str, ...] = ()
    steps: tuple[int, ...] = ()
    channels: tuple[tuple[float, ...], ...] = ()
    weights: tuple[tuple[float, ...], ...] = ()
    totals: tuple[dict[str, float], ...] = ()
    end: int = 0

    @classmethod
    def of(cls, before: Snapshot, layers: Collection[str]) -> History:
        """An empty history of ``layers`` (names; what lies inside a name belongs to it)."""
        return cls(layers=tuple(row.name for row in before.rows if belongs(row.name, layers)))

    def extended(self, step: int, before: Snapshot, now: Snapshot) -> History:
        """The history with one more moment; the same columns if nothing has changed since the last."""
        shares = {row.name: remaining(pair) for pair in match_layers(before.rows, now.rows) for row in pair.before}
        channels, weights = zip(*((0.0, 0.0), *(shares[name] for name in self.layers)), strict=True)
        channels = tuple(round(share, 4) for share in channels[1:])
        weights = tuple(round(share, 4) for share in weights[1:])
        totals = _totals(before, now)
        if self.steps and (channels, weights, totals) == (self.channels[-1], self.weights[-1], self.totals[-1]):
            return replace(self, end=step)
        return replace(
            self,
            steps=(*self.steps, step),
            channels=(*self.channels, channels),
            weights=(*self.weights, weights),
            totals=(*self.totals, totals),
            end=step,
        )._thinned()

    def plain(self) -> dict[str, Any]:
        """In plain types, for a checkpoint."""
        return {
            "layers": list(self.layers),
            "steps": list(self.steps),
            "channels": [list(column) for column in self.channels],
            "weights": [list(column) for column in self.weights],
            "totals": [dict(total) for total in self.totals],
            "end": self.end,
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> History:
        """What `plain` gave."""
        return cls(
            layers=tuple(plain["layers"]),
            steps=tuple(plain["steps"]),
            channels=tuple(tuple(column) for column in plain["channels"]),
            weights=tuple(tuple(column) for column in plain["weights"]),
            totals=tuple(dict(total) for total in plain["totals"]),
            end=plain["end"],
        )

    def _thinned(self) -> History:
        """Every other column, once there are too many; the first and the last stay."""
        count = len(self.steps)
        if count <= _MOST_COLUMNS:
            return self
        kept = [index for index in range(count) if index % 2 == 0 or index == count - 1]
        return replace(
            self,
            steps=tuple(self.steps[index] for index in kept),
            channels=tuple(self.channels[index] for index in kept),
            weights=tuple(self.weights[index] for index in kept),
            totals=tuple(self.totals[index] for index in kept),
        )


def _totals(before: Snapshot, now: Snapshot) -> dict[str, float]:
    pairs = {"params": (before.params, now.params), "bytes": (before.bytes, now.bytes)}
    if before.macs is not None and now.macs is not None:
        pairs["macs"] = (before.macs, now.macs)
    return {key: round(has / had, 4) for key, (had, has) in pairs.items() if had}
