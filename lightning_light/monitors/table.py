"""Format a table of every layer before and after compression, for a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from lightning_light.measure.layer_table import LayerRow
from lightning_light.monitors.layer_matching import LayerPair, is_within, match_layers
from lightning_light.monitors.snapshot import Snapshot, row_bytes
from lightning_light.validation import validated

__all__ = ["compression_markdown", "compression_table", "human_bytes", "human_count"]

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
) -> Table:
    """Return a table of every layer and the model before and after. Unchanged quantities are listed below it.

    Args:
        before: the dense model.
        after: the compressed model.
        layers: names of the layers with a line of their own, all by default; the others share one line.
        notes: more lines below the table.
        title: of the table.

    Example:
        >>> from rich.console import Console
        >>> from lightning_light.monitors import take_snapshot
        >>> before, after = take_snapshot(nn.Linear(8, 4)), take_snapshot(nn.Linear(8, 2))
        >>> Console(width=80).print(compression_table(before, after, title=None))
        <BLANKLINE>
          layer     channels    params         size
         ─────────────────────────────────────────────
          (model)      4 → 2   36 → 18   144B → 72B
        <BLANKLINE>
          total                36 → 18   144B → 72B
          remaining              50.0%        50.0%
        <BLANKLINE>
        sparsity: 0%, unchanged
        bits per weight: 32, unchanged
    """
    sheet = _sheet(before, after, layers)
    table = Table(
        title=title,
        caption="\n".join((*sheet.constants, *notes)) or None,
        caption_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
    )
    for header in sheet.headers:
        table.add_column(header, justify="right" if header in _NUMBERS else "left", overflow="fold")
    for line in sheet.lines:
        table.add_row(*(_styled(cell) for cell in line))
    table.add_section()
    for line in sheet.totals:
        table.add_row(*(_styled(cell) for cell in line), style="bold")
    return table


@validated
def compression_markdown(
    before: Snapshot, after: Snapshot, *, layers: Collection[str] | None = None, notes: Sequence[str] = ()
) -> str:
    """Return the table of `compression_table` as Markdown."""
    sheet = _sheet(before, after, layers)
    ruler = ["---:" if header in _NUMBERS else "---" for header in sheet.headers]
    totals = [[f"**{cell}**" if cell else "" for cell in line] for line in sheet.totals]
    lines = ["| " + " | ".join(line) + " |" for line in (sheet.headers, ruler, *sheet.lines, *totals)]
    return "\n".join((*lines, "", *(f"{note}  " for note in (*sheet.constants, *notes))))


def human_count(value: float) -> str:
    """Format a number with three digits and a prefix, without a space, where a narrow table would break the line.

    Example:
        >>> human_count(999), human_count(1234), human_count(56_780_000)
        ('999', '1.23k', '56.8M')
    """
    for limit, prefix in ((1e3, ""), (1e6, "k"), (1e9, "M"), (1e12, "G")):
        if value < limit * 0.9995:
            return f"{value / (limit / 1e3):.3g}{prefix}"
    return f"{value / 1e12:.3g}T"


def human_bytes(value: float) -> str:
    """Format bytes with a decimal prefix, as `Size` reads them.

    Example:
        >>> human_bytes(820), human_bytes(1_630_000)
        ('820B', '1.63MB')
    """
    return f"{human_count(value)}B"


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


def _percent(value: float) -> str:
    """Format a fraction in percent; only exactly 0 and 1 are shown as 0% and 100%."""
    percent = 100 * value
    digits = 0 if percent in (0.0, 100.0) else 1
    return f"{min(max(percent, 0.1), 99.9) if 0 < percent < 100 else percent:.{digits}f}%"


_COLUMNS = (
    _Column("type", _kinds, lambda _: "", optional=True),
    _Column("channels", _width, lambda _: ""),
    _Column(
        "params",
        lambda rows: human_count(sum(row.params for row in rows)),
        lambda model: human_count(model.params),
        lambda model: model.params,
    ),
    _Column(
        "MACs",
        lambda rows: human_count(sum(row.macs for row in rows)),
        lambda model: _UNKNOWN if model.macs is None else human_count(model.macs),
        lambda model: model.macs,
    ),
    _Column(
        "sparsity",
        lambda rows: _percent(_mean(rows, [row.sparsity for row in rows])),
        lambda model: _percent(model.sparsity),
        optional=True,
    ),
    _Column(
        "dead filters",
        lambda rows: str(sum(row.dead_filters for row in rows)),
        lambda model: str(model.dead_filters),
        optional=True,
    ),
    _Column(
        "bits",
        lambda rows: f"{_mean(rows, [row.bits for row in rows]):.3g}",
        lambda model: f"{model.bits:.3g}",
        optional=True,
    ),
    _Column(
        "size",
        lambda rows: human_bytes(sum(map(row_bytes, rows))),
        lambda model: human_bytes(model.bytes),
        lambda model: model.bytes,
    ),
)
_STATS: dict[str, tuple[str, Callable[[float], str]]] = {
    "rank": ("rank", lambda value: f"{value:.0f}"),
    "energy_kept": ("energy kept", lambda value: _percent(value)),
    "reconstruction_error": ("error", lambda value: f"{value:.3g}"),
    "coded_bits": ("coded bits", lambda value: f"{value:.3g}"),
    "weight_bits": ("weight bits", lambda value: f"{value:.3g}"),
    "activation_bits": ("activation bits", lambda value: f"{value:.3g}"),
}  # numbers of the methods, which have no value before
_NUMBERS = frozenset(
    [column.header for column in _COLUMNS if column.header != "type"] + [header for header, _ in _STATS.values()]
)
_LABELS = {"sparsity": "sparsity", "bits": "bits per weight"}


# The cells of the table, independent of the format.


@dataclass(frozen=True)
class _Sheet:
    headers: list[str]
    lines: list[list[str]]
    totals: list[list[str]]
    constants: list[str]


def _sheet(before: Snapshot, after: Snapshot, layers: Collection[str] | None) -> _Sheet:
    pairs = _lines(match_layers(before.rows, after.rows), layers)
    columns = [column for column in _COLUMNS if not _is_unchanged(column, pairs, before, after)]
    if before.macs is None and after.macs is None:
        columns = [column for column in columns if column.header != "MACs"]
    stats = [key for key in _STATS if any(key in numbers for numbers in after.stats.values())]
    unchanged = [column for column in _COLUMNS if column not in columns and column.header in _LABELS]
    return _Sheet(
        headers=["layer", *(column.header for column in columns), *(_STATS[key][0] for key in stats)],
        lines=[
            [pair.name, *(_cell(column, pair) for column in columns), *(_stat(key, pair, after) for key in stats)]
            for pair in pairs
        ],
        totals=[
            [
                "total",
                *(_change(column.of_model(before), column.of_model(after)) for column in columns),
                *_blank(stats),
            ],
            ["remaining", *(_remaining(column, before, after) for column in columns), *_blank(stats)],
        ],
        constants=[f"{_LABELS[column.header]}: {column.of_model(after)}, unchanged" for column in unchanged],
    )


def _lines(pairs: list[LayerPair], layers: Collection[str] | None) -> list[LayerPair]:
    """Return one pair per line; the layers without a line of their own share one."""
    if layers is None:
        return [LayerPair(pair.name or "(model)", pair.before, pair.after) for pair in pairs]
    shown = [pair for pair in pairs if is_within(pair.name, layers)]
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


def _blank(columns: Sequence[str]) -> list[str]:
    return [""] * len(columns)


def _change(old: str, new: str) -> str:
    return new if old == new else f"{old} → {new}"


def _remaining(column: _Column, before: Snapshot, after: Snapshot) -> str:
    if column.amount is None:
        return ""
    had, has = column.amount(before), column.amount(after)
    return _percent(has / had) if had and has is not None else ""


def _styled(cell: str) -> Text:
    """Highlight a value that has changed, and dim what it was."""
    old, arrow, new = cell.partition(" → ")
    return Text.assemble((old, "dim"), (arrow, "dim"), (new, "green")) if arrow else Text(cell)
