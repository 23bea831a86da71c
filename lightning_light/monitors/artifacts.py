"""Give the final table of a run to its loggers, each in the form that it has for tables or files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_light.formatting import DataTable
from lightning_light.host.classes import is_host
from lightning_light.monitors.scalars import PREFIX

__all__ = ["log_table"]

_FILE = f"{PREFIX}.md"


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
