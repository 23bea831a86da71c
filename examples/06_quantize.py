"""Train a small network, in its second half with the rounding of int8 kernels; export it, and ask the file itself.

The Lightning module is written as for any training: it knows nothing of compression. Two minutes on two CPU cores.
"""

import argparse
from collections.abc import Callable
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


def block(inputs: int, outputs: int, stride: int) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Classifier(L.LightningModule):
    def __init__(self, width: int = 32, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.features = nn.Sequential(block(1, width, 2), block(width, 2 * width, 2), block(2 * width, 4 * width, 2))
        self.head = nn.Linear(4 * width, 10)
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
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
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def top1(run: Callable[[Tensor], Tensor], data: FashionMNIST) -> float:
    """Of the file, on all test images."""
    right = sum(int((run(images).argmax(1) == labels).sum()) for images, labels in data.test_dataloader())
    return right / len(data.test)


def train(callbacks: list[L.Callback], export: ll.MobileExport, args: argparse.Namespace) -> list[str]:
    """One row of the table: what the trained network and its exported file measure."""
    L.seed_everything(0, verbose=False)
    module, data = Classifier(), FashionMNIST(args.data)
    trainer = L.Trainer(
        max_epochs=args.epochs, callbacks=[*callbacks, export], default_root_dir=args.out, log_every_n_steps=10
    )
    trainer.fit(module, datamodule=data)
    (metrics,) = trainer.test(module, datamodule=data, verbose=False)  # rounded, where the callback is in the list
    file, report = export.exporter.load(Path(export.path)), export.report
    return [
        f"{metrics['test_accuracy']:.2%}", f"{top1(file, data):.2%}", f"{report.bytes / 1e3:.0f} kB",
        f"{report.latency.median * 1e3:.3f} ms",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="an .npz file or a folder with the four official files")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--engine", choices=("qnnpack", "x86"), default="qnnpack", help="phones, or this machine")
    parser.add_argument("--out", type=Path, default=Path("runs/quantize"))
    args = parser.parse_args()

    qat = ll.QuantizationAwareTraining(ll.Int8(engine=args.engine), start=0.5, observe_batches=2)
    before = train([], ll.MobileExport(args.out / "float.ptl"), args)
    after = train([qat], ll.MobileExport(args.out / "int8.ptl"), args)
    table = Table("", "accuracy, module", "accuracy, file", "file", "latency", title="Before -> after")
    table.add_row("float", *before)
    table.add_row(f"int8, {args.engine}", *after)
    Console().print(table)


if __name__ == "__main__":
    main()
