"""Draw a run and its layers. Needs matplotlib: ``pip install lightning-light[report]``.

Its pictures are static SVG of some ten kilobytes, which a page holds inline; an interactive library would add some
megabytes of script to every report.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_light.errors import UnsupportedError
from lightning_light.formatting import human_count, short_names
from lightning_light.measure import History, Snapshot
from lightning_light.measure.layer_matching import match_layers
from lightning_light.validation import validated

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "check_matplotlib",
    "front_figure",
    "has_matplotlib",
    "layer_figure",
    "least_of",
    "new_figure",
    "report_image",
    "run_figure",
    "svg",
]

Curve = Sequence[tuple[int, float]]
Point = tuple[float, float]

_COLORS = {"macs": "#081d58", "params": "#1d91c0", "bytes": "#7fcdbb"}
_NAMES = {"macs": "MACs", "params": "parameters", "bytes": "stored size"}
_METRIC_STYLES = (("#d95f0e", "-"), ("#737373", "--"), ("#993404", ":"))  # against the cool colors of the costs


@validated
def report_image(
    history: History,
    path: str | os.PathLike[str],
    *,
    metrics: Mapping[str, Curve] | None = None,
    title: str = "",
    dpi: int = 160,
) -> None:
    """Draw the remaining costs and the metrics of a run, and below them a heat map of the layers.

    Args:
        history: ``monitor.history`` after the run.
        path: of the picture; its suffix selects the format.
        metrics: name -> (step, value in [0, 1]), drawn beside the costs: ``{"test accuracy": [(100, 0.81), ...]}``.
        title: of the picture.
        dpi: dots per inch of a picture that is 8 inches wide.

    Raises:
        UnsupportedError: matplotlib is not installed.
        ValueError: the history is empty.
    """
    if not history.layers or not history.steps:
        raise ValueError(
            f"`report_image` of {len(history.layers)} layers at {len(history.steps)} steps: expected at least one "
            "of each. Take the history of a run with a `CompressionMonitor`."
        )
    figure = run_figure(history, metrics or {})
    if title:
        figure.suptitle(title, fontweight="bold")
    figure.savefig(path, dpi=dpi)


def check_matplotlib(call: str) -> None:
    """Refuse a call that draws where matplotlib is not installed.

    Raises:
        UnsupportedError: names the extra.
    """
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise UnsupportedError(
            f"`{call}`: expected the package matplotlib, found that it cannot be imported ({error}). Install it: "
            "`pip install lightning-light[report]`."
        ) from error


def has_matplotlib() -> bool:
    """Check whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def new_figure(call: str, width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches, for the function ``call``.

    Raises:
        UnsupportedError: matplotlib cannot be imported.
    """
    check_matplotlib(call)
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def front_figure(
    points: Sequence[Point],
    front: Sequence[Point],
    labels: tuple[str, str],
    *,
    name: str,
    joined: bool = True,
    chosen: Point | None = None,
) -> Figure:
    """Draw candidates as dots, and their Pareto front.

    Args:
        points: of all candidates.
        front: of those that no other one beats.
        labels: of the axes.
        name: of the candidates in the legend.
        joined: whether the front is joined by steps.
        chosen: the candidate that is marked.
    """
    figure = new_figure("figure", 6, 4)
    axes = figure.subplots()
    if points:
        axes.scatter(*zip(*points, strict=True), color="#7fcdbb", label=name)
        line = "-" if joined else ""
        style: dict[str, Any] = {"color": "#081d58", "marker": "o", "linestyle": line, "drawstyle": "steps-post"}
        axes.plot(*zip(*sorted(front), strict=True), label="Pareto front", **style)
        if chosen is not None:
            ring: dict[str, Any] = {"facecolors": "none", "edgecolors": "#d95f0e", "linewidths": 2.0}
            axes.scatter(*chosen, s=120, zorder=3, label="chosen", **ring)
        axes.legend(frameon=False)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def least_of(points: Sequence[Point]) -> list[Point]:
    """Return the points of which no other is at most as large in both values, by the first value.

    Example:
        >>> least_of([(1.0, 3.0), (2.0, 1.0), (2.0, 2.0), (3.0, 1.0)])
        [(1.0, 3.0), (2.0, 1.0)]
    """
    kept: list[Point] = []
    for x, y in sorted(points):
        if not kept or y < kept[-1][1]:
            kept.append((x, y))
    return kept


def run_figure(history: History, metrics: Mapping[str, Curve]) -> Figure:
    """Draw the remaining costs and the metrics over the steps, and below them a heat map of the layers."""
    rows = max(1.2, 0.2 * len(history.layers))
    figure = new_figure("run_figure", 8, 3.4 + rows)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, rows))
    steps = [step for curve in metrics.values() for step, _ in curve]
    end = max([history.end, history.steps[-1] + 1, *steps])
    _draw_curves(above, history, metrics, end)
    _draw_layers(below, history, end)
    above.set_xlim(history.steps[0], end)
    return figure


def layer_figure(before: Snapshot, after: Snapshot) -> Figure:
    """Draw the MACs of each layer before and after as bars; the parameters where MACs are not known."""
    quantity = "params" if before.macs is None or after.macs is None else "macs"
    pairs = [
        (pair.name, *(sum(getattr(row, quantity) for row in rows) for rows in (pair.before, pair.after)))
        for pair in match_layers(before.rows, after.rows)
    ]
    shown = [pair for pair in pairs if max(pair[1:])]
    figure = new_figure("layer_figure", 8, 0.9 + 0.22 * len(shown))
    axes, places = figure.subplots(), range(len(shown))
    axes.barh(places, [had for _, had, _ in shown], color="#d9e6ee", height=0.8, label="before")
    axes.barh(places, [has for _, _, has in shown], color=_COLORS["macs"], height=0.45, label="after")
    axes.set_yticks(places, short_names([name for name, _, _ in shown]))
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.xaxis.set_major_formatter(lambda value, _: human_count(value))
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(f"{_NAMES[quantity]} of each layer", loc="left", fontsize=10)
    axes.legend(frameon=False, ncols=2, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1.0), borderaxespad=0.2)
    return figure


def svg(figure: Figure) -> str:
    """Return a figure as an ``<svg>`` element, with text as text."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lightning-light"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawn = buffer.getvalue()
    return drawn[drawn.index("<svg") :]


def _draw_curves(axes: Axes, history: History, metrics: Mapping[str, Curve], end: int) -> None:
    """Draw costs as step functions, and metrics as lines with a dot at each measurement."""
    steps = [*history.steps, end]
    for key, color in _COLORS.items():
        fractions = [total[key] for total in history.totals if key in total]
        if len(fractions) == len(history.totals):
            line = "--" if key == "bytes" else "-"  # over the parameters, which are often the same share
            axes.step(
                steps, [*fractions, fractions[-1]], line, where="post", color=color, linewidth=2, label=_NAMES[key]
            )
    for (color, line), (name, curve) in zip(_METRIC_STYLES * len(metrics), metrics.items(), strict=False):
        axes.plot(*zip(*curve, strict=True), line, color=color, marker="o", markersize=4, linewidth=1.5, label=name)
    axes.set_ylim(0, 1.04)
    axes.yaxis.set_major_formatter(lambda fraction, _: f"{fraction:.0%}")
    axes.grid(axis="y", color="#e5e5e5")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=3, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.2)


def _draw_layers(axes: Axes, history: History, end: int) -> None:
    shown = history.channels if any(min(column) < 1 for column in history.channels) else history.weights
    kind = "output channels" if shown is history.channels else "weights"
    count = len(history.layers)
    edges = [*history.steps, end]
    field = [[column[row] for column in shown] for row in range(count)]
    axes.pcolormesh(edges, range(count + 1), field, cmap="YlGnBu", vmin=0, vmax=1)
    axes.hlines(range(1, count), edges[0], edges[-1], color="white", linewidth=0.8)
    axes.set_yticks([row + 0.5 for row in range(count)], short_names(history.layers))
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.set_title(f"remaining {kind} of each layer", loc="left", fontsize=10)
    axes.set_xlabel("training step")
    for row, fraction in enumerate(shown[-1]):
        axes.annotate(f"{fraction:.0%}", (1.01, row + 0.5), xycoords=("axes fraction", "data"), va="center", fontsize=8)
