"""Train a small residual network; then prune it to 40 % of its MACs within one run under the dense one, and export it.

The LightningModule is written as for any training: it has no code for compression. About 70 s on one CPU core.
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
    def __init__(self, width: int = 24, lr: float = 0.1, channels_last: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(nn.MaxPool2d(2), Block(width, width, 1), Block(width, 2 * width, 2))
        self.head = nn.Linear(2 * width, 10)
        self.accuracy = MulticlassAccuracy(10, average="micro")
        if channels_last:  # convolutions and pooling on a CPU take two thirds of the time
            self.to(memory_format=torch.channels_last)

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


def train(name: str, callbacks: list[L.Callback], args: argparse.Namespace) -> tuple[Classifier, list[str]]:
    """Train and export one network; return it and its row of the table."""
    L.seed_everything(0, verbose=False)
    module, data = Classifier(channels_last=True), FashionMNIST(args.data)
    export = ll.MobileExport(args.out / f"{name}.ptl")
    trainer = L.Trainer(
        max_epochs=args.epochs, callbacks=[*callbacks, export], default_root_dir=args.out, log_every_n_steps=10
    )
    trainer.fit(module, datamodule=data)
    (metrics,) = trainer.test(module, datamodule=data, verbose=False)
    trainer.save_checkpoint(args.out / f"{name}.ckpt", weights_only=False)
    return module, [
        name,
        f"{metrics['test_accuracy']:.2%}",
        f"{sum(weight.numel() for weight in module.parameters()):,}",
        f"{export.report.macs / 1e6:.2f} M",
        f"{export.report.bytes / 1e3:.0f} kB",
        f"{export.report.latency.median * 1e3:.3f} ms",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="an .npz file or a folder with the four official files")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("runs/prune_and_export"))
    args = parser.parse_args()

    dense, before = train("dense", [ll.CompressionMonitor(table=False)], args)
    compression = [
        ll.KnowledgeDistillation(teacher=dense),
        ll.StructuredPruning(ll.MACs(0.4), schedule=ll.Window(ll.Cubic(), start=0.3, end=0.7)),
        ll.CompressionMonitor(),
    ]
    _, after = train("pruned", compression, args)
    table = Table("", "test accuracy", "parameters", "MACs", "file", "latency", title="Before -> after")
    table.add_row(*before)
    table.add_row(*after)
    Console().print(table)


if __name__ == "__main__":
    main()
