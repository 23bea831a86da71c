"""LightningModules in the manner of published projects: training reads more than ``forward`` does, or other things."""

import copy
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.zoo import noise, tokens

BATCHES, BATCH_SIZE = 4, 8


class Loader:
    """Four batches in fixed order; it knows how far it is, so that a run can go on in the middle of an epoch."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        self.given = self.skipped = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        start, self.skipped = self.skipped, 0
        for place in range(start, len(self.batches)):
            self.given = place + 1
            yield self.batches[place]

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped = state["given"] % len(self.batches)


def images() -> list[Any]:
    many = BATCHES * BATCH_SIZE
    return list(zip(noise(many, 3, 8, 8).split(BATCH_SIZE), tokens(many, below=5).split(BATCH_SIZE), strict=True))


def convolutions(channels: int = 12) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


class Board(pl.loggers.logger.DummyLogger):
    """A logger that counts the images it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.images = 0

    @property
    def experiment(self) -> Any:
        return self

    def add_image(self, *_: Any) -> None:
        self.images += 1


class Project(pl.LightningModule):
    """The same weights at every construction; images and labels."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.make()

    def make(self) -> None: ...

    def train_dataloader(self) -> Any:
        return Loader(images())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


class Dice(nn.Module):
    """A loss module, as segmentation libraries have them."""

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        overlap = (logits.sigmoid() * mask).sum((1, 2, 3))
        return (1 - 2 * overlap / (logits.sigmoid() + mask).sum((1, 2, 3)).clamp_min(1e-6)).mean()


class Segmentation(Project):
    """A wrapper without ``forward``: the step calls ``self.model(x)`` and a loss module, and logs an image."""

    def make(self) -> None:
        self.model = nn.Sequential(convolutions(), nn.Conv2d(12, 1, 1))
        self.loss = Dice()
        self.outputs: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        mask = (batch[0].mean(1, keepdim=True) > 0).float()
        logits = self.model(batch[0])
        self.outputs.append(logits.detach())
        self.logger.experiment.add_image("mask", logits[0].sigmoid(), self.global_step)
        return self.loss(logits, mask)


class Autoencoder(Project):
    """``forward`` returns the code; the step compares the decoded image with the input, through named calls."""

    def make(self) -> None:
        self.example_input_array = noise(2, 3, 8, 8)
        self.encoder = nn.Sequential(convolutions(), nn.Conv2d(12, 6, 1))
        self.decoder = nn.Sequential(nn.Conv2d(6, 10, 3, padding=1), nn.ReLU(), nn.Conv2d(10, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.decoder(self(batch[0])), batch[0])


class VAE(Project):
    """The evidence lower bound in the step, through ``encode`` and ``decode``; ``forward`` reads the mean alone."""

    def make(self) -> None:
        self.example_input_array = noise(2, 3, 8, 8)
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU())
        self.mean, self.log_var = nn.Linear(16, 6), nn.Linear(16, 6)
        self.decoder = nn.Sequential(nn.Linear(6, 14), nn.ReLU(), nn.Linear(14, 192))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.encoder(x)
        return self.mean(h), self.log_var(h)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z).view(-1, 3, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x)[0])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        mean, log_var = self.encode(batch[0])
        z = mean + noise(*mean.shape) * (0.5 * log_var).exp()
        kl = -0.5 * (1 + log_var - mean.pow(2) - log_var.exp()).sum(1).mean()
        return F.mse_loss(self.decode(z), batch[0], reduction="sum") / len(z) + kl


class BYOL(Project):
    """A target network that follows the online network, updated in a hook; ``forward`` is the online network."""

    def make(self) -> None:
        self.online = nn.Sequential(convolutions(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10))
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.predictor = nn.Sequential(nn.Linear(10, 9), nn.ReLU(), nn.Linear(9, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.online(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        first, second = batch[0], batch[0].flip(-1)
        with torch.no_grad():
            wanted = self.target(second)
        return 2 - 2 * F.cosine_similarity(self.predictor(self(first)), wanted).mean()

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        for old, new in zip(self.target.parameters(), self.online.parameters(), strict=True):
            old.data = 0.9 * old.data + 0.1 * new.data


class Follow(pl.Callback):
    """Updates the target network, and counts."""

    def __init__(self) -> None:
        self.updates = 0

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.updates += 1
        for old, new in zip(pl_module.target.parameters(), pl_module.online.parameters(), strict=True):
            old.data.mul_(0.9).add_(new.data, alpha=0.1)


class Followed(BYOL):
    """The target network is updated by a callback, which the module brings along."""

    def make(self) -> None:
        super().make()
        self.follow = Follow()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None: ...

    def configure_callbacks(self) -> Any:
        return [self.follow]


class MeanTeacher(Project):
    """A teacher by `AveragedModel`, updated in ``optimizer_step``, and a frozen network that is nobody's average."""

    def make(self) -> None:
        self.student = nn.Sequential(convolutions(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))
        self.teacher = AveragedModel(self.student, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=False)
        self.teacher.update_parameters(self.student)  # from here on it averages, and does not copy
        self.perceptual = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.student(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            wanted = self.teacher(batch[0]).softmax(1)
            weight = self.perceptual(batch[0]).mean((1, 2, 3)).sigmoid()
        logits = self(batch[0])
        consistency = (logits.softmax(1) - wanted).pow(2).sum(1) * weight
        return F.cross_entropy(logits, batch[1]) + consistency.mean()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.teacher.update_parameters(self.student)


class Auxiliary(Project):
    """Two heads that only the step calls: one on pruned features, one with a fixed width; the example is given."""

    def make(self) -> None:
        self.example_input_array = noise(2, 3, 8, 8)
        self.backbone, self.neck = convolutions(), nn.Conv2d(12, 10, 1)
        self.head, self.rotation, self.fixed = nn.Linear(10, 5), nn.Linear(12, 4), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.neck(self.backbone(x)).mean((2, 3)))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        features = self.backbone(batch[0])
        loss = F.cross_entropy(self(batch[0]), batch[1])
        loss = loss + F.cross_entropy(self.rotation(features.mean((2, 3))), batch[1] % 4)
        return {"loss": loss + self.fixed(self.neck(features).mean((2, 3)).view(-1, 10)).square().mean()}


class GAN(Project):
    """Two optimizers by hand; ``forward`` is the generator, and only training runs the critic."""

    def make(self) -> None:
        self.automatic_optimization = False
        self.example_input_array = noise(2, 6)
        self.generator = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3 * 8 * 8))
        self.critic = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2), nn.LeakyReLU(), nn.Conv2d(8, 11, 3), nn.Flatten(), nn.Linear(11, 1)
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z).view(-1, 3, 8, 8)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(self.generator.parameters()), torch.optim.Adam(self.critic.parameters())], []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        made = self(noise(len(batch[0]), 6))
        loss = F.softplus(-self.critic(made)).mean()
        self.manual_backward(loss)
        first.step()
        first.zero_grad()
        self.untoggle_optimizer(first)
        loss = F.softplus(-self.critic(batch[0])).mean() + F.softplus(self.critic(made.detach())).mean()
        self.manual_backward(loss)
        second.step()
        second.zero_grad()


@dataclass
class Graphs:
    """Several graphs in one object, as graph libraries batch them."""

    x: Tensor
    adjacency: Tensor
    pool: Tensor
    y: Tensor


class GraphLayer(nn.Module):
    """Adds up the messages of the neighbours."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.message, self.update = nn.Linear(width, out), nn.Linear(width, out)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return F.relu(self.update(x) + adjacency @ self.message(x))


class GraphNetwork(Project):
    """The step hands an object to ``forward``, which writes into it; an auxiliary head reads the nodes."""

    def make(self) -> None:
        self.first, self.second = GraphLayer(4, 12), GraphLayer(12, 10)
        self.head, self.nodes = nn.Linear(10, 3), nn.Linear(12, 4)

    def train_dataloader(self) -> Any:
        adjacency, pool = (noise(12, 12) > 0).float(), torch.eye(3).repeat_interleave(4, 1)
        return Loader([Graphs(noise(12, 4), adjacency, pool, tokens(3, below=3)) for _ in range(BATCHES)])

    def forward(self, data: Graphs) -> Tensor:
        data.x = self.first(data.x, data.adjacency)
        data.x = self.second(data.x, data.adjacency)
        return self.head(data.pool @ data.x)

    def training_step(self, batch: Graphs, batch_idx: int) -> Tensor:
        nodes, before = batch.x, self.nodes(self.first(batch.x, batch.adjacency))
        loss = F.cross_entropy(self.forward(batch), batch.y) + F.mse_loss(before, nodes)
        batch.x = nodes
        return loss


class Forecaster(Project):
    """Dicts with covariates that may be None, through keyword arguments; the example has none of them."""

    def make(self) -> None:
        self.example_input_array = {"past": noise(2, 12, 2)}
        self.model = Seasonal()

    def train_dataloader(self) -> Any:
        batches = [
            {"past": noise(BATCH_SIZE, 12, 2), "known": noise(BATCH_SIZE, 4, 3), "static": None, "future": noise(8, 4)}
            for _ in range(BATCHES)
        ]
        return Loader(batches)

    def forward(self, past: Tensor, known: Tensor | None = None, static: Tensor | None = None) -> Tensor:
        return self.model(past, known=known, static=static)["mean"]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        future = batch.pop("future")  # as many projects do, with a dict of their own
        found = self.model(batch["past"], known=batch["known"], static=batch["static"])
        batch["future"] = future
        return F.gaussian_nll_loss(found["mean"], future, found["scale"].exp())


class Seasonal(nn.Module):
    """Sums a path through the past and one through what is known of the future."""

    def __init__(self) -> None:
        super().__init__()
        self.past, self.known, self.static = nn.Linear(24, 16), nn.Linear(12, 16), nn.Linear(5, 16)
        self.mean, self.scale = nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, past: Tensor, known: Tensor | None = None, static: Tensor | None = None) -> dict[str, Tensor]:
        h = self.past(past.flatten(1))
        if known is not None:
            h = h + self.known(known.flatten(1))
        if static is not None:
            h = h + self.static(static)
        return {"mean": self.mean(F.relu(h)), "scale": self.scale(F.relu(h))}


PROJECTS: dict[str, type[Project]] = {
    "segmentation": Segmentation,
    "autoencoder": Autoencoder,
    "variational autoencoder": VAE,
    "byol": BYOL,
    "byol by a callback": Followed,
    "mean teacher": MeanTeacher,
    "auxiliary heads": Auxiliary,
    "gan": GAN,
    "graph network": GraphNetwork,
    "forecaster": Forecaster,
}
