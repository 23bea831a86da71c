"""Compare a network before and after compression in a table of every layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from lightning_light.formatting import DataTable, human_bytes, human_count, human_percent
from lightning_light.measure.layer_matching import LayerPair, match_layers
from lightning_light.measure.layer_table import LayerRow
from lightning_light.measure.snapshot import Snapshot
from lightning_light.targets import inside
from lightning_light.validation import validated

__all__ = ["compression_table"]

_UNKNOWN = "?"
_Rows = tuple[LayerRow, ...]


@validated
def compression_table(
    before: Snapshot,
    after: Snapshot,
    *,
    layers: Collection[str] | None = None,
    notes: Sequence[str] = (),
    title: str | None = "Compression: before → after",
) -> DataTable:
    """Return a table of every layer and the model before and after. Unchanged quantities are listed below it.

    Args:
        before: the dense model.
        after: the compressed model.
        layers: names of the layers with a line of their own, all by default; the others share one line.
        notes: more lines below the table.
        title: of the table.

    Example:
        >>> from lightning_light.measure import take_snapshot
        >>> before, after = take_snapshot(nn.Linear(8, 4)), take_snapshot(nn.Linear(8, 2))
        >>> print(compression_table(before, after, title=None))
          layer      channels   params         size
         ──────────────────────────────────────────
          (model)       4 → 2  36 → 18  144B → 72B
        <BLANKLINE>
          total                36 → 18  144B → 72B
          remaining              50.0%        50.0%
        <BLANKLINE>
        sparsity: 0%, unchanged
        bits per weight: 32, unchanged
    """
    pairs = _lines(match_layers(before.rows, after.rows), layers)
    columns = [column for column in _COLUMNS if not _is_unchanged(column, pairs, before, after)]
    if before.macs is None and after.macs is None:
        columns = [column for column in columns if column.header != "MACs"]
    stats = [key for key in _STATS if any(key in numbers for numbers in after.stats.values())]
    unchanged = [column for column in _COLUMNS if column not in columns and column.header in _LABELS]
    changes = [_change(column.of_model(before), column.of_model(after)) for column in columns]
    shares, blank = [_remaining(column, before, after) for column in columns], [""] * len(stats)
    return DataTable(
        ("layer", *(column.header for column in columns), *(_STATS[key][0] for key in stats)),
        tuple(
            (pair.name, *(_cell(column, pair) for column in columns), *(_stat(key, pair, after) for key in stats))
            for pair in pairs
        ),
        totals=(("total", *changes, *blank), ("remaining", *shares, *blank)),
        notes=(*(f"{_LABELS[column.header]}: {column.of_model(after)}, unchanged" for column in unchanged), *notes),
        title=title,
        text_columns=frozenset({"type"}),
        droppable=_DROPPABLE,
    )


# Columns: how to format a quantity of layers, and of the whole model.


@dataclass(frozen=True)
class _Column:
    header: str
    of_rows: Callable[[_Rows], str]
    of_model: Callable[[Snapshot], str]
    amount: Callable[[Snapshot], float | None] | None = None  # of which a fraction can remain
    optional: bool = False  # listed in one line where it is unchanged


def _width(rows: _Rows) -> str:
    return next((str(row.channels_out) for row in reversed(rows) if row.channels_out is not None), "")


def _kinds(rows: _Rows) -> str:
    kinds = [row.type for row in rows]
    unique = list(dict.fromkeys(kinds))
    return " + ".join(f"{kinds.count(kind)} {kind}" if kinds.count(kind) > 1 else kind for kind in unique)


def _mean(rows: _Rows, values: Sequence[float]) -> float:
    """Return the mean over several layers, weighted by their parameters."""
    weights = [row.params for row in rows]
    total = sum(weights)
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / total if total else 0.0


def _sum(header: str, key: str, shown: Callable[[float], str]) -> _Column:
    """Return the column of a quantity that adds up over the layers, and of which a fraction can remain."""
    return _Column(
        header,
        lambda rows: shown(sum(getattr(row, key) for row in rows)),
        lambda model: _UNKNOWN if getattr(model, key) is None else shown(getattr(model, key)),
        lambda model: getattr(model, key),
    )


def _average(key: str, shown: Callable[[float], str]) -> _Column:
    """Return the column of a mean over the weights."""
    return _Column(
        key,
        lambda rows: shown(_mean(rows, [getattr(row, key) for row in rows])),
        lambda model: shown(getattr(model, key)),
        optional=True,
    )


_COLUMNS = (
    _Column("type", _kinds, lambda _: "", optional=True),
    _Column("channels", _width, lambda _: ""),
    _sum("params", "params", human_count),
    _sum("MACs", "macs", human_count),
    _average("sparsity", human_percent),
    _Column(
        "dead filters",
        lambda rows: str(sum(row.dead_filters for row in rows)),
        lambda model: str(model.dead_filters),
        optional=True,
    ),
    _average("bits", "{:.3g}".format),
    _sum("size", "bytes", human_bytes),
)
_STATS: dict[str, tuple[str, Callable[[float], str]]] = {
    "rank": ("rank", lambda value: f"{value:.0f}"),
    "energy_kept": ("energy kept", lambda value: human_percent(value)),
    "reconstruction_error": ("error", lambda value: f"{value:.3g}"),
    "coded_bits": ("coded bits", lambda value: f"{value:.3g}"),
    "activation_bits": ("activation bits", lambda value: f"{value:.3g}"),
}  # numbers of the methods, which have no value before
_DROPPABLE = ("type", "dead filters", "energy kept", "error", "coded bits", "activation bits", "params", "channels")
_LABELS = {"sparsity": "sparsity", "bits": "bits per weight"}


def _lines(pairs: list[LayerPair], layers: Collection[str] | None) -> list[LayerPair]:
    """Return one pair per line; the layers without a line of their own share one."""
    if layers is None:
        return [LayerPair(pair.name or "(model)", pair.before, pair.after) for pair in pairs]
    shown = [pair for pair in pairs if inside(pair.name, layers)]
    rest = [pair for pair in pairs if pair not in shown]
    if not rest:
        return shown
    others = LayerPair(
        f"({len(rest)} other{'s' if len(rest) > 1 else ''})",
        tuple(row for pair in rest for row in pair.before),
        tuple(row for pair in rest for row in pair.after),
    )
    return [*shown, others]


def _is_unchanged(column: _Column, pairs: list[LayerPair], before: Snapshot, after: Snapshot) -> bool:
    """Check whether an optional column is unchanged in every line."""
    if not column.optional or column.of_model(before) != column.of_model(after):
        return False
    return all(column.of_rows(pair.before) == column.of_rows(pair.after) for pair in pairs)


def _cell(column: _Column, pair: LayerPair) -> str:
    if len(pair.before) > 1 and len(pair.after) > 1 and column.header in ("type", "channels"):
        return ""  # several layers in one line
    old = column.of_rows(pair.before) if pair.before else "none"
    new = column.of_rows(pair.after) if pair.after else "none"
    return "" if column.header == "type" and old == new else _change(old, new)


def _stat(key: str, pair: LayerPair, now: Snapshot) -> str:
    """Format a number of the layer itself, else the mean over the layers that replaced it, by their parameters."""
    shown = _STATS[key][1]
    if key in now.stats.get(pair.name, {}):
        return shown(now.stats[pair.name][key])
    known = tuple(row for row in pair.after if key in now.stats.get(row.name, {}))
    return shown(_mean(known, [now.stats[row.name][key] for row in known])) if known else ""


def _change(old: str, new: str) -> str:
    return new if old == new else f"{old} → {new}"


def _remaining(column: _Column, before: Snapshot, after: Snapshot) -> str:
    if column.amount is None:
        return ""
    had, has = column.amount(before), column.amount(after)
    return human_percent(has / had) if had and has is not None else ""
