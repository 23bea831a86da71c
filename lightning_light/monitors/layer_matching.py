"""Which rows after belong to which rows before: a layer may have become several, and several may have become one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_light.measure.layer_table import LayerRow

__all__ = ["Pair", "belongs", "match_layers", "remaining"]


@dataclass(frozen=True)
class Pair:
    """One place in a network, before and after. Either side may be empty: a layer can come, and it can go.

    Attributes:
        name: the path of the place.
        before: the layers that stood there.
        after: the layers that stand there.
    """

    name: str
    before: tuple[LayerRow, ...]
    after: tuple[LayerRow, ...]


def match_layers(before: Sequence[LayerRow], after: Sequence[LayerRow]) -> list[Pair]:
    """Pair rows by name; ``conv.0`` and ``conv.1`` are what a ``conv`` was replaced by, and the other way round.

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
    for row in before:
        sides.setdefault(_place(row.name, own=left, other=right), ([], []))[0].append(row)
    for row in after:
        sides.setdefault(_place(row.name, own=right, other=left), ([], []))[1].append(row)
    return [Pair(name, tuple(old), tuple(new)) for name, (old, new) in sides.items()]


def belongs(name: str, places: Iterable[str]) -> bool:
    """Whether the layer ``name`` is one of ``places`` or lies inside one."""
    return any(name == place or name.startswith(place + ".") for place in places)


def remaining(pair: Pair) -> tuple[float, float]:
    """(channels, weights that are not zero) that ``pair`` still has, as shares of what it had; 1.0 where it had none.

    The channels are those that come out of the place, so of its last layer that says how many.
    """
    if not pair.after:
        return 0.0, 0.0
    had, has = _channels(pair.before), _channels(pair.after)
    dense, kept = _nonzero(pair.before), _nonzero(pair.after)
    return has / had if had and has is not None else 1.0, kept / dense if dense else 1.0


def _place(name: str, *, own: set[str], other: set[str]) -> str:
    """The name under which a row is paired: the shortest of its own and its parents' that only the other side has."""
    if name in other:
        return name
    parts = name.split(".")
    parents = [".".join(parts[:depth]) for depth in range(1, len(parts))]
    return next((parent for parent in parents if parent in other and parent not in own), name)


def _channels(rows: tuple[LayerRow, ...]) -> int | None:
    return next((row.channels_out for row in reversed(rows) if row.channels_out is not None), None)


def _nonzero(rows: tuple[LayerRow, ...]) -> float:
    return sum(row.params * (1.0 - row.zeros) for row in rows)
