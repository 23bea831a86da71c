"""Draw one picture of a whole run. Needs matplotlib: ``pip install lightning-light[examples]``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_light.monitors.heat_map import short_names
from lightning_light.monitors.history import History
from lightning_light.validation import validated

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["report_image"]

Curve = Sequence[tuple[int, float]]

_COLORS = {"macs": "#081d58", "params": "#1d91c0", "bytes": "#7fcdbb"}
_NAMES = {"macs": "MACs", "params": "parameters", "bytes": "tensor bytes"}
_METRIC_COLORS = ("#d95f0e", "#993404", "#fe9929")  # warm, against the cool ones of the costs


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
        ImportError: matplotlib is not installed.
        ValueError: the history is empty.
    """
    from matplotlib.figure import Figure

    if not history.layers or not history.steps:
        raise ValueError(
            f"`report_image` of {len(history.layers)} layers at {len(history.steps)} steps: expected at least one "
            "of each. Take the history of a run with a `CompressionMonitor`."
        )
    rows = max(1.2, 0.2 * len(history.layers))
    figure = Figure(figsize=(8, 3.4 + rows), layout="constrained", dpi=dpi)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, rows))
    _draw_curves(above, history, metrics or {})
    _draw_layers(below, history)
    if title:
        figure.suptitle(title, fontweight="bold")
    figure.savefig(path)


def _draw_curves(axes: Axes, history: History, metrics: Mapping[str, Curve]) -> None:
    """Draw costs as step functions, and metrics as lines with a dot at each measurement."""
    steps = [*history.steps, _end(history)]
    for key, color in _COLORS.items():
        fractions = [total[key] for total in history.totals if key in total]
        if len(fractions) == len(history.totals):
            axes.step(steps, [*fractions, fractions[-1]], where="post", color=color, linewidth=2, label=_NAMES[key])
    for color, (name, curve) in zip(_METRIC_COLORS * len(metrics), metrics.items(), strict=False):
        axes.plot(*zip(*curve, strict=True), color=color, marker="o", markersize=4, linewidth=1.5, label=name)
    axes.set_ylim(0, 1.04)
    axes.yaxis.set_major_formatter(lambda fraction, _: f"{fraction:.0%}")
    axes.grid(axis="y", color="#e5e5e5")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=5, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.2)


def _draw_layers(axes: Axes, history: History) -> None:
    shown = history.channels if any(min(column) < 1 for column in history.channels) else history.weights
    kind = "output channels" if shown is history.channels else "weights"
    count = len(history.layers)
    edges = [*history.steps, _end(history)]
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


def _end(history: History) -> int:
    return max(history.end, history.steps[-1] + 1)
