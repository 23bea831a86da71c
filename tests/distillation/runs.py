"""A student, a teacher, and training as one writes it by hand: with distillation in ``training_step``, or without."""

from typing import Any

import lightning.pytorch
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.contract.runs import trainer as silent
from tests.zoo import noise, tokens

WEIGHT, TEMPERATURE = 0.5, 2.0


class Net(nn.Module):
    """Two convolutions and a classifier."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
            self.fc = nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(F.relu(self.conv2(x)).mean((2, 3)))


def mentor() -> Net:
    """The teacher: the same at every call."""
    return Net(12, seed=7)


class Plain(LightningModule):
    """Knows of no teacher.

    Args:
        dict_out: whether ``training_step`` returns a dict.
        manual: whether it optimizes by hand.
    """

    def __init__(self, dict_out: bool = False, manual: bool = False) -> None:
        super().__init__()
        self.net = Net(6, seed=1)
        self.dict_out, self.automatic_optimization = dict_out, not manual

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def extra(self, student: Tensor, batch: Any) -> Tensor | None:
        return None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        student = self(batch[0])
        loss = F.cross_entropy(student, batch[1])
        if (extra := self.extra(student, batch)) is not None:
            loss = loss + extra
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return {"loss": loss, "other": 1} if self.dict_out else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class ByHand(Plain):
    """Distillation as one writes it by hand."""

    def on_fit_start(self) -> None:
        like = next(self.parameters())
        vars(self)["teacher"] = mentor().to(like.device, like.dtype).eval()

    def extra(self, student: Tensor, batch: Any) -> Tensor:
        with torch.no_grad():
            teacher = vars(self)["teacher"](batch[0])
        s, t = student, teacher
        if s.dtype != torch.float64:
            s, t = s.float(), t.float()
        p, q = F.log_softmax(s / TEMPERATURE, 1), F.softmax(t / TEMPERATURE, 1)
        return WEIGHT * (F.kl_div(p, q, reduction="batchmean") * TEMPERATURE * TEMPERATURE)


def loader(samples: int = 32, batch_size: int = 4) -> DataLoader[tuple[Tensor, ...]]:
    """Images, labels, and the numbers of the samples."""
    images, labels = noise(samples, 3, 8, 8), tokens(samples, below=5)
    return DataLoader(TensorDataset(images, labels, torch.arange(samples)), batch_size=batch_size)


def fitted(module: Any, *callbacks: Any, ckpt_path: Any = None, data: Any = None, **options: Any) -> Any:
    """The trained module."""
    run = trainer(*callbacks, **options)
    run.fit(module, data or loader(), ckpt_path=ckpt_path)
    return module


def trainer(*callbacks: Any, **options: Any) -> Any:
    """A silent Trainer of two epochs."""
    return silent(*callbacks, host=lightning.pytorch, **{"max_epochs": 2, **options})


def weights(module: nn.Module) -> Tensor:
    """All of them, in a row."""
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
