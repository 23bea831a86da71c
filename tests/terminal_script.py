"""The main job with monitor and export in a terminal: each progress bar at 80 and 120 columns."""

import fcntl
import os
import struct
import sys
import tempfile
import termios
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from lightning_light.budgets import MACs, Sparsity
from lightning_light.export import MobileExport
from lightning_light.monitors import CompressionMonitor
from lightning_light.quantization import Int8, QuantizationAwareTraining
from lightning_light.schedules import Cubic, Window
from lightning_light.sparsity import WeightPruning
from lightning_light.structured import StructuredPruning
from tests.zoo import Boring

BARS: dict[str, Any] = {"rich": RichProgressBar, "tqdm": TQDMProgressBar, "none": None}
MARKER = "=== job "


class Classifier(Boring):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean(), prog_bar=True)


def run(bar: str) -> None:
    """Prune, mask, quantize and export in one fit."""
    torch.manual_seed(0)
    callbacks = [
        StructuredPruning(MACs(0.4), schedule=Window(Cubic(), start=0.1, end=0.4)),
        WeightPruning(Sparsity(0.5), schedule=Window(Cubic(), start=0.4, end=0.6)),
        QuantizationAwareTraining(Int8(), start=0.7, calibration_batches=2),
        CompressionMonitor(every_n_steps=2),
        MobileExport("model.ptl", latency_runs=2),
        *([BARS[bar]()] if BARS[bar] else []),
    ]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=5,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=bool(BARS[bar]),
    )
    trainer.fit(Classifier(), Boring.data(), Boring.data())


if __name__ == "__main__":
    os.chdir(tempfile.mkdtemp())
    for job in sys.argv[1:]:
        bar, columns = job.split(":")
        if sys.stdout.isatty():
            fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 400, int(columns), 0, 0))
        sys.stdout.write(f"\n{MARKER}{job}\n")
        sys.stdout.flush()
        run(bar)
