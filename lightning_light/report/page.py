"""Write a report as one HTML file that needs no other file, no script and no network."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path
from typing import Any

from lightning_light.formatting import DataTable
from lightning_light.report.contents import RunReport
from lightning_light.report.figures import layer_figure, svg
from lightning_light.validation import validated

__all__ = ["render_report", "write_report"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #eee; white-space: nowrap }
svg { max-width: 100%; height: auto } p { margin: .3rem 0; color: #555 } .wide { overflow-x: auto }
pre { background: #f6f6f6; padding: .6rem; white-space: pre-wrap; overflow-wrap: anywhere }
"""


@validated
def write_report(report: RunReport, path: str | os.PathLike[str]) -> None:
    """Write ``report`` as HTML to ``path``, and as JSON beside it, with the suffix ``.json``.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    page = render_report(report)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    report.write(target.with_suffix(".json"))


@validated
def render_report(report: RunReport, title: str = "Compression report") -> str:
    """Return ``report`` as one self-contained HTML page.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    sections = [
        ("Before → after", _table(report.summary_table())),
        ("Over the run", report.picture()),
        ("Layers", svg(layer_figure(report.before, report.after)) + _table(report.layer_table())),
        ("Exported files", _exports(report)),
        ("Events", _table(report.event_table()) if report.events else ""),
        ("Methods", _listing("\n".join(report.methods))),
        ("How to reproduce", _environment(report)),
    ]
    body = "".join(f"<h2>{escape(name)}</h2>{content}" for name, content in sections if content)
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body><h1>{escape(title)}</h1>{body}</body></html>\n'


def _table(table: DataTable) -> str:
    return f'<div class="wide">{table.html()}</div>'


def _listing(text: str) -> str:
    return f"<pre>{escape(text)}</pre>" if text else ""


def _exports(report: RunReport) -> str:
    note = "<p>Latency (median, 10th and 90th percentile) and outputs were measured on the machine named below.</p>"
    return _table(report.export_table()) + note if report.exports else ""


def _environment(report: RunReport) -> str:
    found: dict[str, Any] = dict(report.environment)
    if not found:
        return ""
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    lines = (
        ("date", found["date"]),
        ("machine", found["machine"]),
        ("threads of torch", str(found["threads"])),
        ("versions", f"Python {found['python']}, {packages}"),
        ("seed", str(found["seed"])),
    )
    return _listing(found["command"]) + _table(DataTable(("", "run"), lines, text_columns=frozenset({"run"})))
