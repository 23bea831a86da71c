"""Plots of accuracy against cost."""

from pathlib import Path
from statistics import mean, stdev

from benchmarks.experiments.rows import AXES, Row
from benchmarks.experiments.table import NONE, OURS


def plot(rows: list[Row], quantity: str, path: Path) -> None:
    """Plot accuracy against a quantity of `AXES`; the same results give the same bytes."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    mpl.use("Agg")
    points = sorted(
        (
            (share, 100 * mean(row.values("accuracy")), row)
            for row in rows
            if (share := row.share(quantity)) is not None
        ),
        key=lambda point: point[:2],
    )
    with mpl.rc_context({"svg.hashsalt": "experiments", "font.size": 8}):
        figure, axes = plt.subplots(figsize=(7, 5))
        for number, (x, y, row) in enumerate(points, 1):
            accuracies = row.values("accuracy")
            spread = 100 * stdev(accuracies) if len(accuracies) > 1 else 0.0
            marker, color = ("o", "tab:blue") if row.experiment.package in (OURS, NONE) else ("s", "tab:orange")
            axes.errorbar(x, y, spread, fmt=marker, color=color, markersize=4, elinewidth=0.7)
            axes.annotate(str(number), (x, y), xytext=(3, 3), textcoords="offset points", fontsize=6)
        axes.plot(*zip(*front([point[:2] for point in points]), strict=True), color="tab:gray", linewidth=0.8, zorder=0)
        axes.set(xlabel=AXES[quantity], ylabel="test accuracy, %")
        names = "\n".join(f"{number}  {row.experiment.name}" for number, (*_, row) in enumerate(points, 1))
        figure.text(0.92, 0.88, names, va="top", fontsize=6)
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the (cost, accuracy) of which no other has at most the cost and at least the accuracy, by cost."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not kept or y > kept[-1][1]:
            kept.append((x, y))
    return kept
