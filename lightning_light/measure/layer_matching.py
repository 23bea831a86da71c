"""Match the layers of a network before and after compression, where one may have been replaced by several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_light.measure.layer_table import LayerRow

__all__ = ["LayerPair", "match_layers", "remaining"]


@dataclass(frozen=True)
class LayerPair:
    """The layers at one path of a network, before and after; empty on one side if a layer was added or removed.

    Attributes:
        name: the path.
        before: the layers at it before.
        after: the layers at it after.
    """

    name: str
    before: tuple[LayerRow, ...]
    after: tuple[LayerRow, ...]


def match_layers(before: Sequence[LayerRow], after: Sequence[LayerRow]) -> list[LayerPair]:
    """Pair rows by name; ``conv.0`` and ``conv.1`` are paired with a ``conv`` that they replace or that replaces them.

    Example:
        >>> from lightning_light.measure import count_cost, layer_table
        >>> dense, factored = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8))
        >>> def rows(layer):
        ...     net = nn.Sequential(layer)
        ...     return layer_table(net, count_cost(net, (torch.zeros(1, 8),)))
        >>> [(pair.name, len(pair.before), len(pair.after)) for pair in match_layers(rows(dense), rows(factored))]
        [('0', 1, 2)]
    """
    left, right = {row.name for row in before}, {row.name for row in after}
    sides: dict[str, tuple[list[LayerRow], list[LayerRow]]] = {}
    for side, rows, own, other in ((0, before, left, right), (1, after, right, left)):
        for row in rows:
            sides.setdefault(_paired_path(row.name, own=own, other=other), ([], []))[side].append(row)
    return [LayerPair(name, tuple(old), tuple(new)) for name, (old, new) in sides.items()]


def remaining(pair: LayerPair) -> tuple[float, float]:
    """Return the remaining fractions of (output channels, nonzero weights) of ``pair``; 1.0 where it had none.

    The output channels are those of the last layer that states how many it has.
    """
    if not pair.after:
        return 0.0, 0.0
    had, has = _channels(pair.before), _channels(pair.after)
    dense, kept = _nonzero(pair.before), _nonzero(pair.after)
    return has / had if had and has is not None else 1.0, kept / dense if dense else 1.0


def _paired_path(name: str, *, own: set[str], other: set[str]) -> str:
    """Return the path under which a row is paired: its own, or of its parents the shortest that only ``other`` has."""
    if name in other:
        return name
    parts = name.split(".")
    parents = [".".join(parts[:depth]) for depth in range(1, len(parts))]
    return next((parent for parent in parents if parent in other and parent not in own), name)


def _channels(rows: tuple[LayerRow, ...]) -> int | None:
    return next((row.channels_out for row in reversed(rows) if row.channels_out is not None), None)


def _nonzero(rows: tuple[LayerRow, ...]) -> float:
    return sum(row.params * (1.0 - row.sparsity) for row in rows)
