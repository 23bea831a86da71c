"""Two gloo processes with batches of their own: ``python -m tests.structured.ddp_script FOLDER PROJECT...``."""

import json
import os
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_light.budgets import Params
from lightning_light.schedules import OneShot
from lightning_light.structured import StructuredPruning
from tests.contract.runs import shapes, trainer
from tests.projects import PROJECTS, Board, Loader, Project


def fit(folder: Path, name: str) -> None:
    """Prune a project; the ranks have the batches in another order, and each its own values."""
    module: Project = PROJECTS[name]()
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    batches = [*reversed(module.train_dataloader().batches)] if rank else module.train_dataloader().batches
    module.train_dataloader = lambda: Loader(batches)  # type: ignore[method-assign]
    pruning = StructuredPruning(Params(0.6), schedule=OneShot(at=0.5))
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)
    run = trainer(pruning, max_epochs=2, devices=2, strategy=strategy, logger=Board(), use_distributed_sampler=False)
    run.fit(module)
    found = {"shapes": shapes(module), "sum": float(sum(p.double().sum() for p in module.parameters()))}
    (folder / f"{name}-{run.global_rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for project in sys.argv[2:]:
        fit(Path(sys.argv[1]), project)
