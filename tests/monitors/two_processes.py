"""Run as a script by `test_compression_monitor_ddp`: two gloo processes, one log, one table."""

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_light.monitors import CompressionMonitor
from tests.surgery.runs import Events, Lit, Loader, trainer


def main(folder: Path, *, watched: bool) -> None:
    """Train with or without a monitor; each rank keeps its weights."""
    torch.set_num_threads(1)
    monitor = [CompressionMonitor(every_n_steps=1)] if watched else []
    options: dict[str, Any] = {
        "devices": 2,
        "strategy": "ddp",
        "max_epochs": 2,
        "use_distributed_sampler": False,
        "logger": TensorBoardLogger(folder) if watched else False,
    }
    run = trainer(Events(cuts=(3,)), *monitor, **options)
    module = Lit()
    run.fit(module, Loader())
    torch.save(module.state_dict(), folder / f"{'watched' if watched else 'alone'}-{run.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), watched=sys.argv[2] == "watched")
