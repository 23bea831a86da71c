"""A run that can be killed: ``python -m tests.kill_script FOLDER KILL_AT``; started by `test_kill`.

It goes on from the newest checkpoint in FOLDER, if there is one. KILL_AT: the step after which the process kills
itself, without a chance to tidy up; 0: never.
"""

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_light.budgets import MACs
from lightning_light.criteria import Taylor
from lightning_light.monitors import CompressionMonitor
from lightning_light.schedules import Linear, Window
from lightning_light.structured import GroupLasso, StructuredPruning
from lightning_light.surgery.attachment import state_of
from tests.contract.bodies import Body, module_class
from tests.contract.runs import outcome, trainer


class Kill(lightning.pytorch.Callback):
    """Ends the process as a power cut would, when the checkpoint of a step has been written."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if self.at and trainer.global_step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, kill_at: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(3)
    saved = sorted(folder.glob("step=*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
    module = module_class(Body, lightning.pytorch)()
    pruning = StructuredPruning(
        MACs(0.5),
        criterion=Taylor(),
        calibration_batches=2,
        schedule=Window(Linear(), start=0.1, end=0.75),
        every_n_steps=3,
        regularizer=GroupLasso(0.01),
    )
    saving = ModelCheckpoint(folder, "step={step}", auto_insert_metric_name=False, save_top_k=-1, every_n_train_steps=1)
    run = trainer(pruning, CompressionMonitor(table=False), saving, Kill(kill_at))
    run.fit(module, ckpt_path=saved[-1] if saved else None)
    metrics = {name: float(value) for name, value in run.callback_metrics.items()}
    compression_state = state_of(module)
    end = {
        **outcome(run, module),
        "metrics": metrics,
        "losses": module.losses,
        "compression_state": compression_state.state,
    }
    torch.save({**end, "edit_log": compression_state.edit_log}, folder / "end.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
