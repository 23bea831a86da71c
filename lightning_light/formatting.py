"""Format numbers, names and tables for people: in a terminal, as Markdown, and as HTML."""

from __future__ import annotations

import html
import os
import shutil
import sys
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

__all__ = [
    "DataTable",
    "Tabular",
    "human_bytes",
    "human_count",
    "human_milliseconds",
    "human_percent",
    "layer_lines",
    "plural",
    "short_names",
]

_ARROW = " → "
_DIM, _GREEN, _BOLD, _PLAIN = "\x1b[2m", "\x1b[32m", "\x1b[1m", "\x1b[0m"
_SHORTEST_NAME = 20


@dataclass(frozen=True)
class DataTable:
    """A table whose first column has names; printed it fits the terminal, in a notebook it is HTML.

    Example:
        >>> print(DataTable(("layer", "params"), (("conv", "36 → 18"),), totals=(("total", "36 → 18"),)))
          layer    params
         ────────────────
          conv    36 → 18
        <BLANKLINE>
          total   36 → 18

    Args:
        headers: of the columns.
        lines: cells of each line.
        totals: cells of the lines below a gap.
        notes: lines of text below the table.
        title: above the table.
        text_columns: headers of columns of text, aligned left as the first one is.
        droppable: headers of the columns to leave out in a narrow terminal, the first of them first.
    """

    headers: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    totals: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()
    title: str | None = None
    text_columns: frozenset[str] = frozenset()
    droppable: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int | None = None, *, color: bool = False) -> str:
        """Return the table as text.

        Args:
            width: characters per line; names are shortened and droppable columns left out until it fits. None: as wide
                as it is.
            color: mark what has changed by terminal colors.
        """
        table, dropped = self, list[str]()
        for header in self.droppable:
            if width is None or min(_SHORTEST_NAME, table._widths()[0]) + table._rest() <= width:
                break
            if header in table.headers:
                table, dropped = table._without(header), [*dropped, header]
        if width is not None:
            table = table._with_names_of(max(width - table._rest(), _SHORTEST_NAME))
        notes = [*self.notes, *([f"too wide for {width} columns: {', '.join(dropped)}"] if dropped else [])]
        return "\n".join(table._rendered(notes, width, color=color))

    def write(self) -> None:
        """Print the table to the terminal, as wide as that is; in full to a file."""
        terminal = sys.stdout.isatty()
        width = shutil.get_terminal_size((80, 24)).columns if terminal else None
        sys.stdout.write(f"\n{self.text(width, color=terminal and 'NO_COLOR' not in os.environ)}\n")

    def markdown(self) -> str:
        """Return the table as Markdown."""
        ruler = ["---:" if self._is_number(header) else "---" for header in self.headers]
        totals = [[f"**{cell}**" if cell else "" for cell in line] for line in self.totals]
        lines = ["| " + " | ".join(line) + " |" for line in (self.headers, ruler, *self.lines, *totals)]
        return "\n".join((*lines, "", *(f"{note}  " for note in self.notes)))

    def html(self) -> str:
        """Return the table as HTML."""
        head = "".join(self._html_cell(header, header, "th") for header in self.headers)
        body = "".join(self._html_line(line) for line in self.lines)
        foot = "".join(self._html_line(line) for line in self.totals)
        title = f'<caption style="text-align: left">{html.escape(self.title)}</caption>' if self.title else ""
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return (
            f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
            f'<tfoot style="font-weight: bold">{foot}</tfoot></table>{notes}'
        )

    def _repr_html_(self) -> str:
        return self.html()

    def _html_line(self, line: Sequence[str]) -> str:
        cells = zip(self.headers, line, strict=True)
        return f"<tr>{''.join(self._html_cell(header, cell, 'td') for header, cell in cells)}</tr>"

    def _html_cell(self, header: str, text: str, tag: str) -> str:
        align = "right" if self._is_number(header) else "left"
        return f'<{tag} style="text-align: {align}">{html.escape(text)}</{tag}>'

    def _is_number(self, header: str) -> bool:
        return header not in self.text_columns and header != self.headers[0]

    def _widths(self) -> list[int]:
        return [max(map(len, column)) for column in zip(self.headers, *self.lines, *self.totals, strict=True)]

    def _rest(self) -> int:
        """Count the characters of a line without the first cell."""
        widths = self._widths()[1:]
        return sum(widths) + 2 * len(widths) + 3

    def _without(self, header: str) -> DataTable:
        place = self.headers.index(header)

        def cut(line: tuple[str, ...]) -> tuple[str, ...]:
            return line[:place] + line[place + 1 :]

        lines, totals = tuple(map(cut, self.lines)), tuple(map(cut, self.totals))
        return replace(self, headers=cut(self.headers), lines=lines, totals=totals)

    def _with_names_of(self, longest: int) -> DataTable:
        names = [line[0] for line in self.lines]
        if max(map(len, names), default=0) > longest:
            names = short_names(names, longest)
        lines = tuple((name, *line[1:]) for name, line in zip(names, self.lines, strict=True))
        return replace(self, lines=lines)

    def _rendered(self, notes: Sequence[str], width: int | None, *, color: bool) -> list[str]:
        widths = self._widths()
        full = sum(widths) + 2 * len(widths)
        lines = [self.title.center(full).rstrip()] if self.title else []
        bold = (_BOLD, _PLAIN) if color else ("", "")
        lines += [bold[0] + self._text_line(self.headers, widths) + bold[1], f" {'─' * full}"]
        lines += [self._text_line(line, widths, color=color) for line in self.lines]
        if self.totals:
            lines += ["", *(bold[0] + self._text_line(line, widths) + bold[1] for line in self.totals)]
        if notes:
            lines += ["", *(part for note in notes for part in _wrapped(note, width))]
        return lines

    def _text_line(self, line: Sequence[str], widths: Sequence[int], *, color: bool = False) -> str:
        cells = []
        for header, cell, width in zip(self.headers, line, widths, strict=True):
            padding = " " * (width - len(cell))
            shown = _colored(cell) if color else cell
            cells.append(padding + shown if self._is_number(header) else shown + padding)
        return "  " + "  ".join(cells).rstrip()


class Tabular(ABC):
    """A result that is printed as tables, and displayed as HTML in a notebook."""

    @abstractmethod
    def tables(self) -> Sequence[DataTable]:
        """Return the result as tables."""

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.tables()))

    def _repr_html_(self) -> str:
        return "".join(table.html() for table in self.tables())


def _colored(cell: str) -> str:
    old, arrow, new = cell.partition(_ARROW)
    return f"{_DIM}{old}{arrow}{_PLAIN}{_GREEN}{new}{_PLAIN}" if arrow else cell


def _wrapped(note: str, width: int | None) -> list[str]:
    """Break a line between words, indented from the second on; a long path stays whole."""
    if width is None:
        return [note]
    return textwrap.wrap(note, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def short_names(names: Sequence[str], longest: int = 40) -> list[str]:
    """Shorten dotted names: without the part that all share, and long ones without their middle.

    Example:
        >>> short_names(["net.encoder.conv", "net.encoder.fc"]), short_names(["model.net.0", "model.net.fc"])
        (['conv', 'fc'], ['net.0', 'net.fc'])
    """
    parents = [name.split(".")[:-1] for name in names]
    shared = sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*parents, strict=False)))
    if any(".".join(name.split(".")[shared:]).isdigit() for name in names):  # a number alone is no name
        shared = max(shared - 1, 0)
    cut = [".".join(name.split(".")[shared:]) or "model" for name in names]
    half = longest // 2
    return [name if len(name) <= longest else f"{name[: longest - half - 1]}…{name[-half:]}" for name in cut]


def layer_lines(lines: Sequence[str], *notes: str) -> DataTable:
    """Return lines of the form ``layer: what is planned for it`` as a table.

    Example:
        >>> print(layer_lines(["conv: 16 -> 8 channels"]))
          layer  plan
         ─────────────────────────
          conv   16 -> 8 channels
    """
    parts = (line.partition(": ") for line in lines)
    return DataTable(
        ("layer", "plan"), tuple((name, plan) for name, _, plan in parts), notes=notes, text_columns=frozenset({"plan"})
    )


def plural(count: int, noun: str) -> str:
    """Return a count and its noun.

    Example:
        >>> plural(1, "layer"), plural(5, "layer"), plural(2, "batch")
        ('1 layer', '5 layers', '2 batches')
    """
    ending = "es" if noun.endswith("ch") else "s"
    return f"{count} {noun}{'' if count == 1 else ending}"


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


def human_milliseconds(seconds: float) -> str:
    """Format seconds as milliseconds.

    Example:
        >>> human_milliseconds(0.01234)
        '12.3 ms'
    """
    return f"{1e3 * seconds:.3g} ms"


def human_percent(value: float) -> str:
    """Format a fraction in percent; only exactly 0 and 1 are shown as 0% and 100%.

    Example:
        >>> human_percent(0.0), human_percent(0.0001), human_percent(0.805)
        ('0%', '0.1%', '80.5%')
    """
    percent = 100 * value
    digits = 0 if percent in (0.0, 100.0) else 1
    return f"{min(max(percent, 0.1), 99.9) if 0 < percent < 100 else percent:.{digits}f}%"
