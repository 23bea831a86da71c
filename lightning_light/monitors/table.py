"""Before -> after, layer by layer: for a terminal, and as markdown for loggers that show text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from lightning_light.measure.layer_table import LayerRow
from lightning_light.monitors.layer_matching import Pair, belongs, match_layers
from lightning_light.monitors.snapshot import Snapshot, row_bytes

__all__ = ["compression_markdown", "compression_table", "human_bytes", "human_count"]

_UNKNOWN = "?"
_Rows = tuple[LayerRow, ...]


def compression_table(
    before: Snapshot,
    after: Snapshot,
    *,
    layers: Collection[str] | None = None,
    notes: Sequence[str] = (),
    title: str | None = "Compression: before → after",
) -> Table:
    """A table of what every layer, and the model, was and is. A column in which nothing changed is told below it.

    Args:
        before: the dense model.
        after: the compressed one.
        layers: names of the layers that get a line, all by default; the others share one line.
        notes: more lines below the table.
        title: above the table.

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
        share of zeros: 0%, unchanged
        bits of a stored weight: 32, unchanged
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


def compression_markdown(
    before: Snapshot, after: Snapshot, *, layers: Collection[str] | None = None, notes: Sequence[str] = ()
) -> str:
    """The same table in markdown."""
    sheet = _sheet(before, after, layers)
    ruler = ["---:" if header in _NUMBERS else "---" for header in sheet.headers]
    totals = [[f"**{cell}**" if cell else "" for cell in line] for line in sheet.totals]
    lines = ["| " + " | ".join(line) + " |" for line in (sheet.headers, ruler, *sheet.lines, *totals)]
    return "\n".join((*lines, "", *(f"{note}  " for note in (*sheet.constants, *notes))))


def human_count(value: float) -> str:
    """Three digits and a prefix, without a space in which a narrow table would break the line.

    Example:
        >>> human_count(999), human_count(1234), human_count(56_780_000)
        ('999', '1.23k', '56.8M')
    """
    for limit, prefix in ((1e3, ""), (1e6, "k"), (1e9, "M"), (1e12, "G")):
        if value < limit * 0.9995:
            return f"{value / (limit / 1e3):.3g}{prefix}"
    return f"{value / 1e12:.3g}T"


def human_bytes(value: float) -> str:
    """Bytes with a decimal prefix, as files are listed and as `Size` reads them.

    Example:
        >>> human_bytes(820), human_bytes(1_630_000)
        ('820B', '1.63MB')
    """
    return f"{human_count(value)}B"


# What the columns say: of a layer, and of the whole model.


@dataclass(frozen=True)
class _Column:
    header: str
    of_rows: Callable[[_Rows], str]
    of_model: Callable[[Snapshot], str]
    amount: Callable[[Snapshot], float | None] | None = None  # of which a share can remain
    optional: bool = False  # told in one line where it is the same everywhere


def _width(rows: _Rows) -> str:
    return next((str(row.channels_out) for row in reversed(rows) if row.channels_out is not None), "")


def _kinds(rows: _Rows) -> str:
    kinds = [row.type for row in rows]
    unique = list(dict.fromkeys(kinds))
    return " + ".join(f"{kinds.count(kind)} {kind}" if kinds.count(kind) > 1 else kind for kind in unique)


def _mean(rows: _Rows, values: Sequence[float]) -> float:
    """Of a share or a width over several layers, by their parameters."""
    weights = [row.params for row in rows]
    total = sum(weights)
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / total if total else 0.0


def _share(value: float) -> str:
    """A share in percent; what is not quite all or nothing is not rounded to it."""
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
        "zeros",
        lambda rows: _share(_mean(rows, [row.zeros for row in rows])),
        lambda model: _share(model.zeros),
        optional=True,
    ),
    _Column(
        "dead", lambda rows: str(sum(row.dead for row in rows)), lambda model: str(model.dead_filters), optional=True
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
_FACTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "rank": ("rank", lambda value: f"{value:.0f}"),
    "energy_kept": ("energy kept", lambda value: _share(value)),
    "reconstruction_error": ("error", lambda value: f"{value:.3g}"),
    "coded_bits": ("coded bits", lambda value: f"{value:.3g}"),
    "weight_bits": ("weight bits", lambda value: f"{value:.3g}"),
    "activation_bits": ("activation bits", lambda value: f"{value:.3g}"),
}  # what methods say of a layer as it is; there is no before
_NUMBERS = frozenset(
    [column.header for column in _COLUMNS if column.header != "type"] + [header for header, _ in _FACTS.values()]
)
_LABELS = {"zeros": "share of zeros", "bits": "bits of a stored weight"}


# The sheet: headers and cells, before it is decided how they are shown.


@dataclass(frozen=True)
class _Sheet:
    headers: list[str]
    lines: list[list[str]]
    totals: list[list[str]]
    constants: list[str]


def _sheet(before: Snapshot, after: Snapshot, layers: Collection[str] | None) -> _Sheet:
    pairs = _lines(match_layers(before.rows, after.rows), layers)
    columns = [column for column in _COLUMNS if not _is_idle(column, pairs, before, after)]
    if before.macs is None and after.macs is None:
        columns = [column for column in columns if column.header != "MACs"]
    facts = [key for key in _FACTS if any(key in numbers for numbers in after.facts.values())]
    idle = [column for column in _COLUMNS if column not in columns and column.header in _LABELS]
    return _Sheet(
        headers=["layer", *(column.header for column in columns), *(_FACTS[key][0] for key in facts)],
        lines=[
            [pair.name, *(_cell(column, pair) for column in columns), *(_fact(key, pair, after) for key in facts)]
            for pair in pairs
        ],
        totals=[
            [
                "total",
                *(_change(column.of_model(before), column.of_model(after)) for column in columns),
                *_blank(facts),
            ],
            ["remaining", *(_remaining(column, before, after) for column in columns), *_blank(facts)],
        ],
        constants=[f"{_LABELS[column.header]}: {column.of_model(after)}, unchanged" for column in idle],
    )


def _lines(pairs: list[Pair], layers: Collection[str] | None) -> list[Pair]:
    """A pair a line; the layers that get none are one pair together."""
    if layers is None:
        return [Pair(pair.name or "(model)", pair.before, pair.after) for pair in pairs]
    shown = [pair for pair in pairs if belongs(pair.name, layers)]
    rest = [pair for pair in pairs if pair not in shown]
    if not rest:
        return shown
    others = Pair(
        f"({len(rest)} other{'s' if len(rest) > 1 else ''})",
        tuple(row for pair in rest for row in pair.before),
        tuple(row for pair in rest for row in pair.after),
    )
    return [*shown, others]


def _is_idle(column: _Column, pairs: list[Pair], before: Snapshot, after: Snapshot) -> bool:
    """Whether a column has nothing to show: it is the same in every line."""
    if not column.optional or column.of_model(before) != column.of_model(after):
        return False
    return all(column.of_rows(pair.before) == column.of_rows(pair.after) for pair in pairs)


def _cell(column: _Column, pair: Pair) -> str:
    if len(pair.before) > 1 and len(pair.after) > 1 and column.header in ("type", "channels"):
        return ""  # of several layers together
    old = column.of_rows(pair.before) if pair.before else "none"
    new = column.of_rows(pair.after) if pair.after else "none"
    return "" if column.header == "type" and old == new else _change(old, new)


def _fact(key: str, pair: Pair, now: Snapshot) -> str:
    """Of the place itself, else the mean over the layers that stand there, by their parameters."""
    shown = _FACTS[key][1]
    if key in now.facts.get(pair.name, {}):
        return shown(now.facts[pair.name][key])
    known = tuple(row for row in pair.after if key in now.facts.get(row.name, {}))
    return shown(_mean(known, [now.facts[row.name][key] for row in known])) if known else ""


def _blank(columns: Sequence[str]) -> list[str]:
    return [""] * len(columns)


def _change(old: str, new: str) -> str:
    return new if old == new else f"{old} → {new}"


def _remaining(column: _Column, before: Snapshot, after: Snapshot) -> str:
    if column.amount is None:
        return ""
    had, has = column.amount(before), column.amount(after)
    return _share(has / had) if had and has is not None else ""


def _styled(cell: str) -> Text:
    """What has changed stands out, what has not steps back."""
    old, arrow, new = cell.partition(" → ")
    return Text.assemble((old, "dim"), (arrow, "dim"), (new, "green")) if arrow else Text(cell)
