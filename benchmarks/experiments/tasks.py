"""Networks, data and training that all experiments share."""

import importlib
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

ROOT = Path(__file__).parents[2]
for folder in ("examples", "benchmarks"):
    sys.path.append(str(ROOT / folder))  # their scripts import each other by file name

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
}


class Task(ABC):
    """A network that is trained before it is compressed, its data, and how it is trained on.

    Attributes:
        name: of the network and its data.
        shape: of one input.
        precision: of training.
    """

    name: str
    shape: tuple[int, ...]
    precision: str = "32-true"

    @property
    def example(self) -> Tensor:
        """An input of batch size one."""
        return torch.zeros(1, *self.shape)

    @abstractmethod
    def missing(self) -> str | None:
        """Name what the task lacks on this machine; None if it can run."""

    @abstractmethod
    def untrained(self) -> nn.Module:
        """Build the network."""

    @abstractmethod
    def trained(self, seed: int) -> nn.Module:
        """Return the network with the weights that every experiment of ``seed`` starts from."""

    @abstractmethod
    def module(self, net: nn.Module) -> L.LightningModule:
        """Wrap ``net``, as attribute ``net``, for training."""

    @abstractmethod
    def train_loader(self) -> DataLoader[Any]:
        """Return shuffled training batches."""

    @abstractmethod
    def test_loader(self) -> DataLoader[Any]:
        """Return the whole test set."""

    def batches(self, count: int) -> Iterator[Any]:
        """Yield ``count`` training batches, without augmentation."""
        return islice(self.train_loader(), count)


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CNN(nn.Module):
    """The residual network of ``examples/01_prune_and_export.py``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(nn.MaxPool2d(2), Block(width, width, 1), Block(width, 2 * width, 2))
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class ViT(nn.Module):
    """A pre-norm transformer on 16 patches of 7 x 7 pixels: four layers with four heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch, self.position = nn.Conv2d(1, width, 7, 7), nn.Parameter(torch.zeros(1, 16, width))
        layers = (
            nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
            for _ in range(4)
        )
        self.layers = nn.Sequential(*layers)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.layers(tokens)).mean(1))


class Classifier(L.LightningModule):
    """Cross entropy with label smoothing, SGD or AdamW, one cycle of the learning rate."""

    def __init__(self, net: nn.Module, lr: float, example: Tensor, optimizer: str = "SGD") -> None:
        super().__init__()
        self.net, self.lr, self.optimizer = net, lr, optimizer
        self.example_input_array = example

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], label_smoothing=0.1)

    def configure_optimizers(self):
        if self.optimizer == "SGD":
            optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=5e-4)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), self.lr, weight_decay=0.05)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass
class FashionCNN(Task):
    """The CNN of the examples on Fashion-MNIST; trained once per seed, and kept in ``cache``.

    Args:
        cache: folder of the starting weights.
        data: folder of the data set.
        width: of the network.
        epochs: of the training of the starting weights.
        lr: of that training.
        second_lr: of the experiments; None for ``lr``.
    """

    cache: Path
    data: str | None = None
    width: int = 24
    epochs: int = 6
    lr: float = 0.1
    second_lr: float | None = None

    name = "CNN, Fashion-MNIST"
    shape = (1, 28, 28)
    kind = "cnn"
    optimizer = "SGD"

    def __post_init__(self) -> None:
        self._data = None

    def missing(self) -> str | None:
        return None

    def untrained(self) -> nn.Module:
        return CNN(self.width)

    def trained(self, seed: int) -> nn.Module:
        net, path = self.untrained(), self.cache / f"{self.kind}-{self.width}-{self.epochs}-{seed}.pt"
        if not path.exists():
            L.seed_everything(seed, verbose=False)
            net = self.untrained()
            trainer = L.Trainer(max_epochs=self.epochs, default_root_dir=self.cache, **QUIET)
            trainer.fit(Classifier(net, self.lr, self.example, self.optimizer), self.train_loader())
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(net.state_dict(), path)
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval()

    def module(self, net: nn.Module) -> L.LightningModule:
        return Classifier(net, self.second_lr or self.lr, self.example, self.optimizer)

    def train_loader(self) -> DataLoader[Any]:
        return self._loaded().train_dataloader()

    def test_loader(self) -> DataLoader[Any]:
        return self._loaded().test_dataloader()

    def _loaded(self) -> Any:
        if self._data is None:
            self._data = importlib.import_module("fashion_mnist").FashionMNIST(self.data)
            self._data.setup("fit")
        return self._data


@dataclass
class ConvergedCNN(FashionCNN):
    """The same network from weights that longer training hardly improves."""

    epochs: int = 20
    second_lr: float | None = 0.03

    name = "CNN trained for 20 epochs, Fashion-MNIST"


@dataclass
class FashionViT(FashionCNN):
    """A small vision transformer on Fashion-MNIST; trained once per seed, and kept in ``cache``."""

    width: int = 64
    epochs: int = 20
    lr: float = 0.002

    name = "ViT, Fashion-MNIST"
    kind = "vit"
    optimizer = "AdamW"

    def untrained(self) -> nn.Module:
        return ViT(self.width)


@dataclass
class CIFARResNet(Task):
    """A CIFAR-10 ResNet with published weights (a state dict with the names of akamaster/pytorch_resnet_cifar10).

    With ``convolution`` shortcuts that change the shape are 1x1 convolutions, which start with the function of the
    published zero padding. torch-pruning cannot prune across the padding.

    Args:
        depth: number of layers.
        data: an ``.npz`` file.
        weights: of the network.
        larger_weights: of ResNet-56, a teacher; None without experiments that name it.
        lr: learning rate.
        convolution: whether shortcuts that change the shape are convolutions.
        precision: of training.
    """

    depth: int
    data: Path | None = None
    weights: Path | None = None
    larger_weights: Path | None = None
    lr: float = 0.01
    convolution: bool = False
    precision: str = "bf16-mixed"

    shape = (3, 32, 32)

    def __post_init__(self) -> None:
        shortcuts = " with convolutional shortcuts" if self.convolution else ""
        self.name = f"ResNet-{self.depth}{shortcuts}, CIFAR-10"
        self._data = None

    def missing(self) -> str | None:
        if self.data is None or self.weights is None:
            return "`--cifar10` and `--weights` (or the variables CIFAR10 and CIFAR10_WEIGHTS)"
        absent = [str(path) for path in (self.data, self.weights) if not path.exists()]
        return " and ".join(absent) or None

    def untrained(self) -> nn.Module:
        return importlib.import_module("nets").cifar_resnet(self.depth, self.convolution)

    def trained(self, seed: int) -> nn.Module:
        net = self.untrained()
        published = torch.load(self.weights, weights_only=True)
        net.load_state_dict({**net.state_dict(), **published})  # convolutional shortcuts are not in the file
        return net.eval()

    def larger(self) -> nn.Module:
        """Return ResNet-56 with published weights."""
        if self.larger_weights is None:
            raise SystemExit("expected the weights of ResNet-56: `--teacher-weights`, or the variable CIFAR10_TEACHER")
        return CIFARResNet(56, weights=self.larger_weights).trained(0)

    def module(self, net: nn.Module) -> L.LightningModule:
        return importlib.import_module("low_bits_resnet").OwnCrops(net, self.lr)

    def train_loader(self) -> DataLoader[Any]:
        return DataLoader(self._loaded()["train"], 128, shuffle=True, drop_last=True)

    def test_loader(self) -> DataLoader[Any]:
        return DataLoader(self._loaded()["test"], 500)

    def _loaded(self) -> Any:
        if self._data is None:
            self._data = importlib.import_module("cifar_resnet").read(self.data)
        return self._data


def from_environment(variable: str) -> Path | None:
    """Return the path that an environment variable holds, if any."""
    value = os.environ.get(variable)
    return Path(value) if value else None
