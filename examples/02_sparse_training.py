"""Four ways to the same network: dense, 90 % pruned gradually, 90 % sparse from the start (RigL), and 2:4.

The LightningModule is not changed for it. Less than a minute on one CPU core; a plot is written to the output folder.
"""

import argparse
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from fashion_mnist import FashionMNIST
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

import lightning_light as ll


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, 2, 1)
        self.conv = nn.Conv2d(16, 32, 3, 2, 1)
        self.hidden = nn.Linear(32 * 7 * 7, 128)
        self.head = nn.Linear(128, 10)
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(F.relu(self.conv(F.relu(self.stem(x)))).flatten(1))))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], label_smoothing=0.1)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.accuracy(self(batch[0]), batch[1])
        self.log("val_accuracy", self.accuracy)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.accuracy(self(batch[0]), batch[1])
        self.log("test_accuracy", self.accuracy)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Curve(L.Callback):
    def __init__(self) -> None:
        self.points: list[tuple[int, float, float]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        accuracy = float(trainer.callback_metrics["val_accuracy"])
        self.points.append((trainer.global_step, ll.measure_sparsity(pl_module).sparsity, accuracy))


def train(
    callbacks: list[L.Callback], args: argparse.Namespace, seed: int = 0
) -> tuple[float, ll.measure.SparsityReport, Curve]:
    L.seed_everything(seed, verbose=False)
    module, data, curve = Classifier(), FashionMNIST(args.data), Curve()
    trainer = L.Trainer(
        max_epochs=args.epochs,
        callbacks=[*callbacks, curve],
        default_root_dir=args.out,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    (metrics,) = trainer.test(module, datamodule=data, verbose=False)
    return metrics["test_accuracy"], ll.measure_sparsity(module), curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="an .npz file or a folder with the four official files")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/sparse_training"))
    args = parser.parse_args()
    methods: dict[str, list[L.Callback]] = {
        "dense": [],
        "gradual 90 %": [ll.WeightPruning(ll.Sparsity(0.9))],
        "RigL 90 %": [ll.DynamicSparseTraining(ll.Sparsity(0.9), every_n_steps=50)],
        "2:4 (SR-STE)": [ll.SRSTE(ll.NM(2, 4), targets=["conv", "h*"])],
    }
    table = Table("", "test accuracy", "sparsity", "compressed", title="Before -> after")
    figure, axes = plt.subplots(2, 1, sharex=True)
    for name, callbacks in methods.items():
        accuracy, report, curve = train(callbacks, args)
        table.add_row(name, f"{accuracy:.2%}", f"{report.sparsity:.2%}", f"{report.deflated / 1e3:.0f} kB")
        steps, sparsity, validated = zip(*curve.points, strict=True)
        axes[0].plot(steps, sparsity, label=name), axes[1].plot(steps, validated, label=name)
    axes[0].set(ylabel="sparsity"), axes[1].set(ylabel="accuracy", xlabel="steps"), axes[1].legend()
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "sparse_training.png")
    Console().print(table)


if __name__ == "__main__":
    main()
