"""Two gloo processes, rows of the table: ``python -m tests.contract.ddp_script FOLDER ROW...``; `test_ddp` reads."""

import hashlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

from lightning_light.errors import RankMismatchError
from tests.contract.bodies import Loader
from tests.contract.case import Case
from tests.contract.runs import checkpoints, differences, module_of, outcome, shapes, trainer
from tests.contract.table import CASES


class Agreement(lightning.pytorch.Callback):
    """Digests of parameters and optimizer state before and after every step, compared between the ranks at the end."""

    def __init__(self) -> None:
        self.digests: list[tuple[int, str]] = []
        self.shapes: list[Any] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.look(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.look(trainer, pl_module)

    def look(self, run: Any, module: Any) -> None:
        if not self.shapes or self.shapes[-1] != shapes(module):
            self.shapes.append(shapes(module))
        digest = hashlib.sha256()
        states = [
            value for optimizer in run.optimizers for state in optimizer.state.values() for value in state.values()
        ]
        for tensor in [*module.parameters(), *states]:
            digest.update(tensor.detach().numpy().tobytes())
        self.digests.append((run.global_step, digest.hexdigest()))

    def apart(self) -> list[int]:
        """Steps at which the ranks differed."""
        both: list[Any] = [None, None]
        dist.all_gather_object(both, self.digests)
        return [first[0] for first, second in zip(*both, strict=True) if first != second]


def fit(case: Case, folder: Path, *beside: Any, resume: Path | None = None, planted: bool = False) -> Any:
    """Each rank has batches of its own."""
    torch.manual_seed(3)
    module = module_of(case)
    module.train_dataloader = lambda: Loader(turn=int(os.environ.get("LOCAL_RANK", "0")))
    callbacks = case.build(folder)
    strategy = DDPStrategy(process_group_backend="gloo")
    run = trainer(*callbacks, *beside, devices=2, strategy=strategy)
    if planted and run.global_rank == 1:
        assert case.plant is not None
        case.plant(callbacks[0])
    run.fit(module, ckpt_path=resume)
    return run, module


def contracts(case: Case, folder: Path) -> dict[str, Any]:
    """What `test_ddp` asserts, in plain types."""
    look, again = Agreement(), Agreement()
    run, module = fit(case, folder, look, *checkpoints(folder, every=1 if case.full else 8))
    events = len(look.shapes)
    found: dict[str, Any] = {"apart": look.apart(), "events": events, "resumed": {}}
    for file in ("step=5", "step=8", "epoch=1") if case.full else ("step=8",):
        second, twin = fit(case, folder, again, resume=folder / f"{file}.ckpt")
        whole, later = outcome(run, module), outcome(second, twin)
        for state in (whole, later):  # each rank has its own running means, and the checkpoint those of rank 0
            state["weights"] = {name: value for name, value in state["weights"].items() if "running" not in name}
        found["resumed"][file] = differences(whole, later)
    found["apart_resumed"] = again.apart()
    if case.plant is not None:
        try:
            fit(case, folder, planted=True)
        except RankMismatchError as error:
            found["mismatch"] = str(error)
    return found


def main(folder: Path, names: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for case in CASES:
        if case.name in names:
            place = folder / case.name
            place.mkdir(exist_ok=True)
            found = contracts(case, place)
            rank = dist.get_rank()
            (folder / f"{case.name}-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
