"""Two small networks trained for int8 on Fashion-MNIST: top-1 in the Trainer, of the module, of each file.

    python benchmarks/int8_trained.py --data fashion_mnist.npz

``mobile`` has inverted residuals: depthwise convolutions, ReLU6, hardswish, squeeze and excitation. ``transformer``
reads an image as 28 rows. ``--data`` is an archive with ``x_train`` (n, 28, 28), ``y_train``, ``x_test``, ``y_test`` as
bytes. Fake quantization is on in the second half of the run; everything is measured on the whole test set, each file by
its own runtime. The x86 kernels need weights in a smaller range: their file is that of a training of its own.
"""

import argparse
from pathlib import Path

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from int8_resnet import rows
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_light as ll

RUNTIMES = {"qnnpack": ["lite", "ExecuTorch", "ONNX"], "x86": ["lite"]}


class Squeeze(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class Inverted(nn.Module):
    """An inverted residual: wide inside, with a depthwise convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int, curve: type[nn.Module], squeeze: bool) -> None:
        super().__init__()
        wide = 4 * inputs
        self.skip = stride == 1 and inputs == outputs
        self.body = nn.Sequential(
            nn.Conv2d(inputs, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            curve(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            curve(),
            Squeeze(wide) if squeeze else nn.Identity(),
            nn.Conv2d(wide, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.skip else self.body(x)


def mobile() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
        Inverted(16, 24, 2, nn.ReLU6, False),
        Inverted(24, 24, 1, nn.ReLU6, False),
        Inverted(24, 40, 2, nn.Hardswish, True),
        Inverted(40, 40, 1, nn.Hardswish, True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(40, 10),
    )


class RowTransformer(nn.Module):
    """Each row of the image is a token."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding, self.position = nn.Linear(28, width), nn.Parameter(0.02 * torch.randn(1, 28, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x.squeeze(1)) + self.position).mean(1))


NETS = {"mobile": (mobile, 0.01), "transformer": (RowTransformer, 0.002)}


class Classifier(L.LightningModule):
    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("top1", (self(batch[0]).argmax(1) == batch[1]).float().mean(), on_epoch=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def read(path: Path) -> dict[str, TensorDataset]:
    """Normalized images and labels."""
    with np.load(path) as archive:
        return {
            part: TensorDataset(
                (torch.from_numpy(archive[f"x_{part}"]).float()[:, None] / 255 - 0.286) / 0.353,
                torch.from_numpy(archive[f"y_{part}"]).long(),
            )
            for part in ("train", "test")
        }


def measure(name: str, engine: str, data: dict[str, TensorDataset], args: argparse.Namespace) -> None:
    """Train, test in the Trainer, export, and ask the files."""
    L.seed_everything(args.seed, verbose=False)
    make, lr = NETS[name]
    module = Classifier(make(), lr)
    qat = ll.QuantizationAwareTraining(ll.Int8(engine=engine), start=0.5)
    trainer = L.Trainer(
        max_epochs=args.epochs,
        callbacks=[qat],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(module, DataLoader(data["train"], 100, shuffle=True, drop_last=True))
    (found,) = trainer.test(module, DataLoader(data["test"], 500), verbose=False)
    print(f"{name}, {engine}: top-1 in the Trainer {found['top1']:.2%}", flush=True)
    plain: dict[str, int] = {}
    rows("float", module.eval(), data["test"], RUNTIMES[engine], plain)
    with ll.fake_quantized(module):
        rows("with training", module, data["test"], RUNTIMES[engine], plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=NETS)
    parser.add_argument("--engines", nargs="+", default=list(RUNTIMES), choices=RUNTIMES)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = read(args.data)
    for name in args.nets:
        for engine in args.engines:
            measure(name, engine, data, args)


if __name__ == "__main__":
    main()
