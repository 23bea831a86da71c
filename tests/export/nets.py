"""Small nets as users write them, in LightningModules for both hosts, and the batches that they are trained on."""

from typing import Any

import lightning.pytorch
import pytorch_lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.zoo import noise, tokens

HOSTS = [lightning.pytorch, pytorch_lightning]


class Images(nn.Module):
    """Residual, with batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.drop, self.fc = nn.Dropout(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        x = F.relu(x + self.bn1(self.conv(x)))
        return self.fc(self.drop(x.mean((2, 3))))


class Words(nn.Module):
    """Recurrent, with dropout between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(11, 6), nn.LSTM(6, 8, num_layers=2, dropout=0.5, batch_first=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, words: Tensor) -> tuple[Tensor, Tensor]:
        outputs, (hidden, _) = self.rnn(self.embedding(words))
        return self.fc(outputs.mean(1)), hidden


class Sentences(nn.Module):
    """Attention with a mask by keyword, and a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(11, 16), nn.TransformerEncoderLayer(16, 4, 20, batch_first=True)
        self.fc = nn.Linear(16, 5)

    def forward(self, words: Tensor, *, mask: Tensor, pooled: bool = False) -> Tensor:
        x = self.layer(self.embedding(words), src_key_padding_mask=mask)
        return self.fc(x.mean(1) if pooled else x[:, 0])


class Records(nn.Module):
    """One dict in, one dict out."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.bn, self.numbers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 6)
        self.fc = nn.Linear(10, 5)

    def forward(self, record: dict[str, Tensor]) -> dict[str, Tensor]:
        image = F.relu(self.bn(self.image(record["image"]))).mean((2, 3))
        features = torch.cat([image, self.numbers(record["numbers"])], dim=1)
        return {"logits": self.fc(features), "features": features}


class _Body:
    """The steps of a LightningModule."""

    def __init__(self, net: nn.Module, automatic: bool = True) -> None:
        super().__init__()
        self.net = net
        self.through_self = automatic

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(*args, **kwargs)

    def output(self, batch: dict[str, Tensor]) -> Tensor:
        net = self if self.through_self else self.net
        if isinstance(self.net, Images):
            return net(batch["image"])
        if isinstance(self.net, Words):
            return net(batch["words"])[0]
        if isinstance(self.net, Sentences):
            return net(batch["words"], mask=batch["mask"], pooled=True)
        return net({"numbers": batch["numbers"], "image": batch["image"]})["logits"]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.output(batch), batch["label"])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.output(batch), batch["label"]), batch_size=4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Lit(_Body, lightning.pytorch.LightningModule):
    pass


class PytorchLit(_Body, pytorch_lightning.LightningModule):
    pass


MODULES = {lightning.pytorch: Lit, pytorch_lightning: PytorchLit}
NETS = [Images, Words, Sentences, Records]


def batches(*, sign: float = 1.0) -> DataLoader[Any]:
    """Sixteen samples, four at a time; validation has the other ``sign``."""
    mask = torch.zeros(16, 6, dtype=torch.bool)
    mask[::2, 4:] = True
    parts = {
        "image": sign * noise(16, 3, 8, 8),
        "numbers": sign * noise(16, 4),
        "words": tokens(16, 6, below=11),
        "mask": mask,
        "label": tokens(16, below=5),
    }
    return DataLoader([{key: part[place] for key, part in parts.items()} for place in range(16)], batch_size=4)


def fit(module: Any, *callbacks: Any, host: Any = lightning.pytorch, **options: Any) -> Any:
    """Train one epoch on one silent CPU; the Trainer."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(type(callback).__name__.endswith("Checkpoint") for callback in callbacks),
        "num_sanity_val_steps": 0,
    }
    trainer = host.Trainer(callbacks=list(callbacks), **{**quiet, **options})
    trainer.fit(module, batches(), batches(sign=-1.0))
    return trainer
