"""What loggers get at the end: hyper-parameters and metrics, by which they compare runs of a sweep, and the table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_light.budgets import Budget, RelativeBudget
from lightning_light.callback import CompressionCallback
from lightning_light.formatting import DataTable
from lightning_light.host.classes import is_host
from lightning_light.host.patches import InstancePatch, wrap_method
from lightning_light.measure.snapshot import Snapshot
from lightning_light.monitors.scalars import PREFIX
from lightning_light.order import Stage
from lightning_light.report.contents import export_reports

__all__ = ["defer_hparams", "final_metrics", "log_table", "method_hparams"]

_FILE = f"{PREFIX}.md"

_DENSE = {"budget/macs": 1.0, "budget/params": 1.0, "budget/sparsity": 0.0, "budget/weight_bits": 32.0}


def method_hparams(callbacks: Iterable[object]) -> dict[str, Any]:
    """Return the methods, their budgets (``budget/macs``: 0.4), and the bits of quantized weights; few, and numeric.

    The usual ones are there without such a method too: TensorBoard takes the columns of its page from one of the runs.
    """
    methods = [each for each in callbacks if isinstance(each, CompressionCallback) and each.stage < Stage.EXPORT]
    hparams = dict(_DENSE)
    for callback in methods:
        budget, recipe = getattr(callback, "budget", None), getattr(callback, "recipe", None)
        if isinstance(budget, Budget):
            goal = budget.remaining if isinstance(budget, RelativeBudget) else budget.goal(1.0)
            hparams[f"budget/{budget.quantity}"] = float(goal)
        if recipe is not None:
            hparams["budget/weight_bits"] = float(recipe.spec().weight.bits)
    return {"methods": " ".join(type(each).method for each in methods) or "none", **hparams}


def final_metrics(now: Snapshot, validation: Mapping[str, float], callbacks: Iterable[object]) -> dict[str, float]:
    """Return the results of a run under ``final/``: validation metrics, MACs, size, and milliseconds of its file."""
    metrics = {name: value for name, value in validation.items() if "loss" not in name} or validation
    results = {**metrics, **({} if now.macs is None else {"macs": float(now.macs)}), "size": float(now.bytes)}
    for report in export_reports(callbacks)[:1]:
        results |= {"latency_ms": 1e3 * report["latency"]["median"], "file_size": float(report["bytes"])}
    results |= {"params": float(now.params), "bits": now.bits}
    return {f"final/{name}": value for name, value in results.items()}


def defer_hparams(logger: Any) -> InstancePatch:
    """Keep a TensorBoard logger from writing hyper-parameters before there are metrics, until the patch is undone.

    TensorBoard keeps only the first hyper-parameters of a run, so they have to be written together with the metrics.
    The file ``hparams.yaml`` is written as always.
    """

    def around(original: Any, params: Any, metrics: Any = None, step: int | None = None) -> None:
        original(params, metrics or {}, step)

    return wrap_method(logger, "log_hyperparams", around)


def log_table(logger: Any, table: DataTable, step: int) -> None:
    """Log ``table``: as text in TensorBoard, a table in W&B, a file in MLflow and beside the CSV; else not at all."""
    text = table.markdown()
    if is_host(logger, "loggers.TensorBoardLogger"):
        logger.experiment.add_text(f"{PREFIX}/table", text, step)
    elif is_host(logger, "loggers.CSVLogger"):
        folder = Path(logger.log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _FILE).write_text(text + "\n", encoding="utf-8")
    elif is_host(logger, "loggers.WandbLogger"):
        rows = [list(line) for line in (*table.lines, *table.totals)]
        logger.log_table(key=f"{PREFIX}/table", columns=list(table.headers), data=rows, step=step)
    elif is_host(logger, "loggers.MLFlowLogger"):
        logger.experiment.log_text(logger.run_id, text, _FILE)
