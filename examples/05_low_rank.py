"""Train a small network, factorize it to half of its MACs during the run, cluster its weights, and export it.

Prints for every layer the form and the rank of its factors, or why it stays dense. One to two minutes on one CPU core.
"""

import argparse
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from fashion_mnist import FashionMNIST
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

import lightning_light as ll
from lightning_light.clustering import WeightClustering, save_clustered
from lightning_light.lowrank import LowRankFactorization, RankAllocation
from lightning_light.measure import count_cost
from lightning_light.schedules import OneShot


class Classifier(L.LightningModule):
    def __init__(self, width: int = 24, lr: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1),
            nn.BatchNorm2d(4 * width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(36 * width, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.accuracy(self(batch[0]), batch[1])
        self.log("test_accuracy", self.accuracy)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.hparams.lr)


def train(callbacks: list[L.Callback], name: str, args: argparse.Namespace) -> list[str]:
    """Train once and return one row of the table."""
    L.seed_everything(0, verbose=False)
    module, data = Classifier(), FashionMNIST(args.data)
    export = ll.MobileExport(args.out / f"{name}.ptl")
    trainer = L.Trainer(
        max_epochs=args.epochs,
        callbacks=[*callbacks, export],
        default_root_dir=args.out,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, datamodule=data)
    (metrics,) = trainer.test(module, datamodule=data, verbose=False)
    cost, packed = count_cost(module, (torch.zeros(1, 1, 28, 28),)), args.out / f"{name}.safetensors"
    save_clustered(module, packed)
    return [
        f"{metrics['test_accuracy']:.2%}",
        f"{cost.params:,}",
        f"{cost.macs / 1e6:.2f} M",
        f"{export.report.latency.median * 1e3:.3f} ms",
        f"{packed.stat().st_size / 1e3:.0f} kB",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="an .npz file or a folder with the four official files")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/low_rank"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    factors = LowRankFactorization(ll.MACs(0.5), schedule=OneShot(at=0.4), allocation=RankAllocation(round_to=4))
    table = Table("", "test accuracy", "parameters", "MACs", "latency", "packed file", title="Before -> after")
    table.add_row("dense", *train([], "dense", args))
    table.add_row("factorized", *train([factors], "factorized", args))
    Console().print("\n".join(factors.last_plan.lines()))
    table.add_row("and clustered", *train([factors, WeightClustering(16, start=0.7)], "clustered", args))
    Console().print(table)


if __name__ == "__main__":
    main()
