"""A module that keeps its hyperparameters, as commands on its checkpoints need."""

import lightning.pytorch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.zoo import noise, tokens


class Net(lightning.pytorch.LightningModule):
    """Two convolutions and a linear layer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU())
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x).mean((2, 3)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(noise(16, 3, 8, 8), tokens(16, below=5)), batch_size=4)


class Wide(Net):
    """Another network."""

    def __init__(self) -> None:
        super().__init__(12)


class Branching(Net):
    """Takes a branch by the values of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() < 1e9 else -x)


class Demanding(Net):
    """Its argument is in no checkpoint of `Net`."""

    def __init__(self, height: int) -> None:
        super().__init__(height)


class Data(lightning.pytorch.LightningDataModule):
    """Its size is a hyperparameter of the checkpoint."""

    def __init__(self, samples: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader:
        return Net().train_dataloader()

    def val_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(noise(self.hparams.samples, 3, 8, 8)), batch_size=4)


def batches() -> list[Tensor]:
    return [noise(2, 3, 8, 8), noise(2, 3, 8, 8)]


def no_batches() -> list[Tensor]:
    return []
