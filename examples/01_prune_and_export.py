"""Train a small residual network, prune it to 40 % of its MACs during training, and export it for a phone.

The LightningModule is written as for any training: it has no code for compression. Two minutes on one CPU core.
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
from lightning_light.measure import count_cost


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Classifier(L.LightningModule):
    def __init__(self, width: int = 24, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(nn.MaxPool2d(2), Block(width, width, 1), Block(width, 2 * width, 2))
        self.head = nn.Linear(2 * width, 10)
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1], label_smoothing=0.1)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.accuracy(self(batch[0]), batch[1])
        self.log("val_accuracy", self.accuracy, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.accuracy(self(batch[0]), batch[1])
        self.log("test_accuracy", self.accuracy)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), self.hparams.lr, momentum=0.9, weight_decay=5e-4)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams.lr, total_steps=int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(callbacks: list[L.Callback], export: ll.MobileExport, args: argparse.Namespace) -> list[str]:
    """Train and export one network; return its row of the table."""
    L.seed_everything(0, verbose=False)
    module, data = Classifier(), FashionMNIST(args.data)
    trainer = L.Trainer(
        max_epochs=args.epochs, callbacks=[*callbacks, export], default_root_dir=args.out, log_every_n_steps=10
    )
    trainer.fit(module, datamodule=data)
    (metrics,) = trainer.test(module, datamodule=data, verbose=False)
    cost, report = count_cost(module, (torch.zeros(1, 1, 28, 28),)), export.report
    return [
        f"{metrics['test_accuracy']:.2%}",
        f"{cost.params:,}",
        f"{cost.macs / 1e6:.2f} M",
        f"{report.bytes / 1e3:.0f} kB",
        f"{report.latency.median * 1e3:.3f} ms",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="an .npz file or a folder with the four official files")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/prune_and_export"))
    args = parser.parse_args()

    torch.set_num_threads(1)  # small layers gain little from more, and lose much beside other processes
    pruning = ll.StructuredPruning(ll.MACs(0.4), schedule=ll.Window(ll.Cubic(), start=0.3, end=0.7))
    before = train([ll.CompressionMonitor(table=False)], ll.MobileExport(args.out / "dense.ptl"), args)
    after = train([pruning, ll.CompressionMonitor()], ll.MobileExport(args.out / "pruned.ptl"), args)
    table = Table("", "test accuracy", "parameters", "MACs", "file", "latency", title="Before -> after")
    table.add_row("dense", *before)
    table.add_row("pruned", *after)
    Console().print(table)


if __name__ == "__main__":
    main()
