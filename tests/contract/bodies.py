"""LightningModules for either host, one trap each, and a loader that remembers where it is. They know no method."""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo import noise, tokens

BATCHES, BATCH_SIZE = 4, 8


class Loader:
    """Four batches in fixed order; it knows how far it is, so that a run can go on in the middle of an epoch.

    Args:
        turn: which batch is the first; ranks with different turns see different batches.
    """

    def __init__(self, turn: int = 0) -> None:
        samples = BATCHES * BATCH_SIZE
        images, labels = noise(samples, 3, 8, 8).split(BATCH_SIZE), tokens(samples, below=5).split(BATCH_SIZE)
        batches = list(zip(images, labels, strict=True))
        self.batches = batches[turn:] + batches[:turn]
        self.given = self.skipped = 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        start, self.skipped = self.skipped, 0
        for place in range(start, BATCHES):
            self.given = place + 1
            yield self.batches[place]

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped = state["given"] % BATCHES


class Features(nn.Module):
    """A residual stage with batch norm: 3 x 8 x 8 images in, 12 features out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 12, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.last(x)).mean((2, 3))


class Body:
    """A classifier of five classes as a user would write it; it keeps its losses."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()  # type: ignore[attr-defined]
        self.lr = lr
        self.losses: list[float] = []
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.make()

    def make(self) -> None:
        self.features: Any = Features()
        self.head: Any = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])  # type: ignore[operator]
        self.losses.append(loss.item())
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))  # type: ignore[attr-defined, operator]

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def train_dataloader(self) -> Loader:
        return Loader()

    def val_dataloader(self) -> Loader:
        return Loader()

    def test_dataloader(self) -> Loader:
        return Loader()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)  # type: ignore[attr-defined]
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)}


class Momentum(Body):
    """Nesterov momentum and weight decay."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)  # type: ignore[attr-defined]


class FrozenBackbone(Body):
    """Only the head and the last layer learn; the optimizer has only what learns."""

    def make(self) -> None:
        super().make()
        for layer in (self.features.stem, self.features.bn0, self.features.conv1):
            layer.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        learning = [parameter for parameter in self.parameters() if parameter.requires_grad]  # type: ignore[attr-defined]
        return torch.optim.AdamW(learning, lr=self.lr)


class Tied(Body):
    """One layer under two names, and one weight with two owners."""

    def make(self) -> None:
        super().make()
        self.alias = self.features.conv1
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(F.relu(self.first(self.features(x)))))


class MadeLate(Body):
    """Layers made in ``configure_model``."""

    def make(self) -> None:
        self.features = None

    def configure_model(self) -> None:
        if self.features is None:
            with torch.random.fork_rng():
                torch.manual_seed(1)
                super().make()


class TwoOptimizers(Body):
    """Two optimizers by hand."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__(lr)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        optimizers = self.optimizers()  # type: ignore[attr-defined]
        loss = self.loss(batch)
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)  # type: ignore[attr-defined]
        for optimizer in optimizers:
            optimizer.step()
        return {"loss": loss.detach()}

    def configure_optimizers(self) -> Any:
        first = torch.optim.SGD(self.features.parameters(), lr=0.05, momentum=0.9)
        return [first, torch.optim.AdamW(self.head.parameters(), lr=self.lr)]


class Lazy(Body):
    """The head knows its inputs after the first forward pass."""

    def make(self) -> None:
        super().make()
        self.head = nn.LazyLinear(5)


class Compiled(Body):
    """The inner net goes through ``torch.compile`` in place; what the backend makes of it is not the point."""

    def make(self) -> None:
        super().make()
        self.features.compile(backend="eager")


class Wrapped(Body):
    """The inner net is what ``torch.compile`` returns, a wrapper."""

    def make(self) -> None:
        super().make()
        self.features = torch.compile(self.features, backend="eager")


@functools.cache
def module_class(body: type[Body], host: Any) -> type[Any]:
    """``body`` as a LightningModule of ``host``, which pickle finds by its name."""
    name = f"{body.__name__}_{host.__name__.replace('.', '_')}"
    made = type(name, (body, host.LightningModule), {"__module__": __name__})
    globals()[name] = made
    return made
