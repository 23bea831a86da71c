"""A small student with and without a teacher, on the part of Fashion-MNIST that ships with the examples.

``python benchmarks/distillation_table.py``: one teacher; for each row three seeds, mean and sample standard deviation
of the accuracy on the 10,000 test images after the last epoch. The hyper-parameters are the same in every row; only
the weights of the losses differ, and none was tuned on the test images.
"""

import argparse
import importlib.util
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning as L
import torch

from lightning_light.distillation import (
    DIST,
    DKD,
    DistillationLoss,
    FeatureHint,
    KnowledgeDistillation,
    KnowledgeReview,
    LogitStandardization,
    SoftTargets,
)
from lightning_light.schedules import Linear, Window

EXAMPLES = Path(__file__).parents[1] / "examples"
ROWS: dict[str, list[DistillationLoss]] = {
    "alone": [],
    "SoftTargets": [SoftTargets()],
    "LogitStandardization": [LogitStandardization()],
    "DKD": [DKD(beta=2.0, schedule=Window(Linear(), start=0.0, end=0.2))],
    "DIST": [DIST()],
    "SoftTargets + FeatureHint": [SoftTargets(), FeatureHint(feature_layers="blocks.2")],
    "SoftTargets + KnowledgeReview": [
        SoftTargets(),
        KnowledgeReview(feature_layers=["blocks.0", "blocks.1", "blocks.2"]),
    ],
}


def example(name: str) -> ModuleType:
    """A module of ``examples/``, whose name may begin with a number."""
    sys.path.insert(0, str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("example", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(maker: Any, width: int, seed: int, callbacks: list[Any], data: Any, epochs: int) -> tuple[Any, float]:
    """The trained module, and its accuracy on the test images."""
    L.seed_everything(seed, verbose=False)
    module = maker(width)
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        accelerator="cpu",
    )
    trainer.fit(module, datamodule=data)
    (metrics,) = trainer.test(module, datamodule=data, verbose=False)
    return module, 100 * metrics["test_accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--teacher", type=int, default=32, help="its width")
    parser.add_argument("--student", type=int, default=6, help="its width")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    distill = example("03_distill")
    data = distill.FashionMNIST()
    teacher, accuracy = train(distill.Classifier, args.teacher, 100, [], data, args.epochs)
    print(f"teacher of width {args.teacher}: {accuracy:.2f}; students of width {args.student}, {args.epochs} epochs")
    for name in args.rows:
        losses = ROWS[name]
        found = []
        for seed in range(args.seeds):
            callbacks = [KnowledgeDistillation(teacher, losses=losses)] if losses else []
            found.append(train(distill.Classifier, args.student, seed, callbacks, data, args.epochs)[1])
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        values = ", ".join(f"{value:.2f}" for value in found)
        print(f"{name:30s} {statistics.mean(found):.2f} +- {spread:.2f}  ({values})", flush=True)


if __name__ == "__main__":
    main()
