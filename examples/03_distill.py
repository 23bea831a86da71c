"""Train a wide teacher on Fashion-MNIST, then a small student alone and with knowledge distillation.

The LightningModule is written as for any training, without a teacher. A minute on one CPU core.
"""

import argparse
from itertools import pairwise
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from fashion_mnist import FashionMNIST
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_light.distillation import KnowledgeDistillation, SoftTargets
from lightning_light.measure import count_cost


class Classifier(L.LightningModule):
    def __init__(self, width: int, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        widths = [1, width, 2 * width, 4 * width]
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
                )
                for inputs, outputs in pairwise(widths)
            )
        )
        self.head = nn.Linear(4 * width, 10)
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((2, 3)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.accuracy(self(batch[0]), batch[1])
        self.log("test_accuracy", self.accuracy)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), self.hparams.lr, momentum=0.9, weight_decay=5e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4 * self.hparams.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(width: int, callbacks: list[L.Callback], args: argparse.Namespace) -> tuple[Classifier, list[str]]:
    """Train a module; returns it and its row of the table."""
    L.seed_everything(args.seed, verbose=False)
    module, data = Classifier(width), FashionMNIST(args.data)
    trainer = L.Trainer(
        max_epochs=args.epochs,
        callbacks=callbacks,
        default_root_dir=args.out,
        limit_val_batches=0,
        log_every_n_steps=10,
    )
    trainer.fit(module, datamodule=data)
    (metrics,) = trainer.test(module, datamodule=data, verbose=False)
    cost = count_cost(module, (torch.zeros(1, 1, 28, 28),))
    return module, [f"{metrics['test_accuracy']:.2%}", f"{cost.params:,}", f"{cost.macs / 1e6:.2f} M"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="an .npz file or a folder with the four official files")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/distill"))
    args = parser.parse_args()

    teacher, teacher_row = train(32, [], args)
    _, alone = train(6, [], args)
    distillation = KnowledgeDistillation(teacher, losses=SoftTargets(temperature=4.0))
    _, distilled = train(6, [distillation], args)
    table = Table("", "test accuracy", "parameters", "MACs", title="Before -> after")
    table.add_row("teacher", *teacher_row)
    table.add_row("student alone", *alone)
    table.add_row("student with teacher", *distilled)
    Console().print(table)


if __name__ == "__main__":
    main()
