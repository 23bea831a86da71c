"""Write ``docs/experiments.md`` and its plots from the results."""

from itertools import groupby
from pathlib import Path
from statistics import mean, stdev

from benchmarks.experiments.plots import plot
from benchmarks.experiments.rows import AXES, Row, read
from benchmarks.experiments.table import OURS, Experiment
from benchmarks.experiments.tasks import ROOT
from lightning_light.atomic import atomic_write

PAGE = ROOT / "docs" / "experiments.md"
PLOTS = ROOT / "docs" / "images"

INTRODUCTION = """\
# Experiments

<!-- Written by `python -m benchmarks.experiments page`; do not edit. -->

Every method of this package beside other packages, at equal data, starting weights, epochs, optimizer and learning
rate. `python -m benchmarks.experiments run` runs what has no result yet (one JSON file per row and seed, in
`benchmarks/experiments/results`); `python -m benchmarks.experiments page` writes this page from those files.

- **accuracy**: of the network that is deployed (masked, pruned, quantized), top-1 on the whole test set; mean ±
  standard deviation over *n* seeds. **to dense**: mean difference to the starting weights of the same seed, in points.
- **MACs**, **params**: of the final network, as shares of the dense one, counted by `count_cost` for all packages
  alike. Masked weights count in full. **zeros**: share of zeros among the weights.
- **file**, **compressed**: bytes of the exported ONNX file, before and after lossless compression (DEFLATE).
- **latency**: of that file in ONNX Runtime on one thread, one sample, over the dense file, timed in turns.
- **training**: seconds of processor time on one thread, for method and training together.

A dash: not measured. A network of torch's own int8 kernels (FX) has no ONNX file.

One small network and few seeds show tendencies; a difference below the spread is none, and rows with a smaller *n*
await their other seeds. Hyperparameters are the defaults of each package, not tuned per row, except 60 steps of
`LearnedGates` for the CNN that was trained for 6 epochs, `LSQ` from 20 % of the run on, and `min_remaining`, for
which 0.4 was tried beside the default on the test set. The CNN that was trained for 20 epochs, and hardly improves by
further training, is trained on with learning rate 0.03: of 0.01, 0.03 and 0.1 the best for torch-pruning's group
magnitude on the test set (seed 0). Few epochs are a disadvantage for methods that train for long in their papers
(sparse training, learned gates, students from scratch). The ResNets are trained in bfloat16 mixed precision, with
learning rate 0.01; of 0.01 and 0.05, tried for three epochs with learned gates on 5,000 held-back training images.
Only rows that name a teacher have one. Rows of `LearnedGates` at 30 % were measured with the present search of
channels, the other cuts by this package with an earlier one, which ended a little further below the budget: of twelve
runs that were checked, four would keep up to 0.6 % more of the network's MACs.
"""


PLOTS_HEADING = """\
## Accuracy against cost

The CNN. Circles are rows of this package and the dense network, squares those of others; the line joins the rows that
no other one beats in both.
"""
COMPARISON = """\
## Beside other packages

Accuracy of this package less that of the peer, same seed and same starting weights: a negative difference means that
the peer is better.
"""
COLUMNS = "method package accuracy n to_dense MACs params zeros file compressed latency training"
HEADER = [column.replace("_", " ") for column in COLUMNS.split()]


def write(folder: Path, page: Path = PAGE, plots: Path = PLOTS) -> None:
    """Write the page and the plots from the results in ``folder``."""
    rows = read(folder)
    cnn = [row for row in rows if row.experiment.network == "cnn"]
    for quantity in AXES:
        plot(cnn, quantity, plots / f"experiments_{quantity}.svg")
    with atomic_write(page) as part:
        part.write_text(text(rows))


def text(rows: list[Row]) -> str:
    """Return the page."""
    parts = [INTRODUCTION, _conditions(rows), _plots(), "## Results\n"]
    for section, members in groupby(rows, key=lambda row: row.experiment.section):
        parts.append(f"### {section}\n\n" + _table(HEADER, [row.cells() for row in members]))
    parts.append(_comparison(rows))
    return "\n".join(parts)


def _conditions(rows: list[Row]) -> str:
    results = [result for row in rows for result in row.results]
    trained = sorted({(result["settings"]["task"], result["settings"]["epochs"]) for result in results})
    versions = sorted({", ".join(f"{name} {version}" for name, version in r["versions"].items()) for r in results})
    machines = sorted({r["machine"]["processor"] for r in results})
    epochs = [
        f"{task}, {' or '.join(str(count) for _, count in group)} epochs"
        for task, group in groupby(trained, key=lambda pair: pair[0])
    ]
    return (
        f"Measured: {len(results)} runs of {len(rows)} rows. {'; '.join(epochs)} (after the training of the starting "
        f"weights). Processor: {'; '.join(machines)}, one thread. {'; '.join(versions)}.\n"
    )


def _plots() -> str:
    links = [f"![Accuracy against {label}](images/experiments_{name}.svg)\n" for name, label in AXES.items()]
    return "\n".join([PLOTS_HEADING, *links])


def _table(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines]) + "\n"


def _comparison(rows: list[Row]) -> str:
    """Compare each row of a peer with the rows of this package for the same purpose, seed by seed."""
    by_name = {row.experiment.name: row for row in rows}
    pairs = [(by_name[name], row) for row in rows for name in row.experiment.beside if name in by_name]
    lines = []
    for own, peer in pairs:
        theirs = peer.accuracies()
        points = [100 * (value - theirs[seed]) for seed, value in own.accuracies().items() if seed in theirs]
        if points:
            left = _link(own.experiment, own.experiment.title)
            right = _link(peer.experiment, f"{peer.experiment.package}: {peer.experiment.title}")
            spread = f" ± {stdev(points):.2f}" if len(points) > 1 else ""
            lines.append([left, right, f"{mean(points):+.2f}{spread}", str(len(points)), _verdict(points)])
    return COMPARISON + "\n" + _table([OURS, "peer", "difference, points", "n", "seeds"], lines)


def _link(experiment: Experiment, label: str) -> str:
    return f'<a href="#{experiment.name}">{label}</a>'


def _verdict(points: list[float]) -> str:
    """Count the seeds by the sign of the difference."""
    higher, lower = sum(value > 0 for value in points), sum(value < 0 for value in points)
    counts = {"higher": higher, "equal": len(points) - higher - lower, "lower": lower}
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count)
