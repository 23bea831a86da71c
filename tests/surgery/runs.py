"""Small runs that are interrupted, resumed and compared: a module, a loader with a memory, a callback that cuts."""

from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch
import pytorch_lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_light.callback import CompressionCallback
from lightning_light.order import Stage
from lightning_light.progress import steps_done
from lightning_light.surgery.averaged_models import averaged_models_of
from lightning_light.surgery.edit import cut
from lightning_light.surgery.operations import register_operation
from lightning_light.surgery.replace import put_module, replace_modules
from tests.zoo import Plain, noise, tokens

HOSTS = [lightning.pytorch, pytorch_lightning]
BATCHES = 4


class Loader:
    """Four batches in fixed order; it knows how far it is, so that a run can go on in the middle of an epoch."""

    def __init__(self) -> None:
        self.batches = list(zip(noise(16, 3, 8, 8).split(4), tokens(16, below=5).split(4), strict=True))
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


class _Body:
    """A LightningModule for either host; it keeps its losses."""

    def __init__(self, optimizer: str = "adamw", by_name: bool = False, early: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(1)
        self.net = Plain()
        self.losses: list[float] = []
        self.optimizer, self.by_name = optimizer, by_name
        self.made = [self.make()] if early else []  # as LightningCLI does: before there is a Trainer

    def make(self) -> torch.optim.Optimizer:
        named = dict(self.named_parameters())
        names = sorted(named, key=lambda name: (not name.endswith("weight"), name)) if self.by_name else list(named)
        parameters = [named[name] for name in names]
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
        return torch.optim.AdamW(parameters, lr=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def val_dataloader(self) -> Loader:
        return Loader()

    test_dataloader = val_dataloader

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.made[0] if self.made else self.make()


class Lit(_Body, lightning.pytorch.LightningModule):
    pass


class PytorchLit(_Body, pytorch_lightning.LightningModule):
    pass


MODULES = {lightning.pytorch: Lit, pytorch_lightning: PytorchLit}


def trainer(*callbacks: Any, host: Any = lightning.pytorch, **options: Any) -> Any:
    """A silent Trainer of three epochs on one CPU."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 3,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(type(callback).__name__.endswith("Checkpoint") for callback in callbacks),
        "num_sanity_val_steps": 0,
        "limit_val_batches": 1,
    }
    return host.Trainer(callbacks=list(callbacks), **{**quiet, **options})


def halve(model: nn.Module, layer: str = "conv1", norm: str = "bn1", reader: str = "conv2", dim: int = 1) -> Any:
    """Which positions stay if the weaker half of ``layer``'s channels leaves."""
    weight = model.get_parameter(f"{layer}.weight")
    strength = weight.detach().flatten(1).norm(dim=1)
    stay = strength.topk(max(1, len(strength) // 2)).indices.sort().values
    names = [f"{layer}.weight", *(f"{norm}.{name}" for name in ("weight", "bias", "running_mean", "running_var"))]
    return {**{name: {0: stay} for name in names}, f"{reader}.weight": {dim: stay}}


@register_operation("tests/factor")
def replay_factor(model: nn.Module, entry: Mapping[str, Any]) -> None:
    put_module(model, entry["name"], two_factors(model.get_submodule(entry["name"]), entry["rank"]))


def two_factors(old: Any, rank: int) -> nn.Sequential:
    """Two untrained layers in the place of one, and its own bias."""
    first, second = nn.Linear(old.in_features, rank, bias=False), nn.Linear(rank, old.out_features)
    second.bias = old.bias
    return nn.Sequential(first, second)


class Events(CompressionCallback):
    """Cut channels and factor a layer at given steps; keep progress and a tensor in the compression state."""

    method = "events"
    stage = Stage.STRUCTURED

    def __init__(
        self, cuts: tuple[int, ...] = (), factor_at: int | None = None, hook: str = "on_train_batch_start"
    ) -> None:
        self.cuts, self.factor_at, self.hook = cuts, factor_at, hook
        self.acted: list[tuple[int, str]] = []

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.hook == "on_train_batch_start":
            self._act(trainer, pl_module)

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.hook == "on_train_batch_end":
            self._act(trainer, pl_module)
        state = self.state(pl_module)
        state["sum"] = state.get("sum", torch.zeros(())) + outputs["loss"].detach()

    def _act(self, trainer: Any, pl_module: Any) -> None:
        done = self.state(pl_module).setdefault("done", [])
        due = {f"cut{at}": at for at in self.cuts} | ({} if self.factor_at is None else {"factor": self.factor_at})
        for name, at in due.items():
            if at <= steps_done(trainer) and name not in done:
                done.append(name)
                self.acted.append((steps_done(trainer), name))
                (self._factor if name == "factor" else self._cut)(trainer, pl_module)

    def _cut(self, trainer: Any, pl_module: Any) -> None:
        names = [f"net.{name}" for name in ("conv1", "bn1", "conv2")]
        edit = cut(
            pl_module,
            halve(pl_module, *names),
            optimizers=trainer.optimizers,
            averaged_models=averaged_models_of(trainer, pl_module),
        )
        self._after_surgery(trainer, pl_module, edit.entry(), "half of conv1 is gone", kept=edit.kept)

    def _factor(self, trainer: Any, pl_module: Any) -> None:
        old = pl_module.net.fc
        torch.manual_seed(2)
        new = two_factors(old, rank=2).to(old.weight.dtype)
        replace_modules(
            pl_module,
            {"net.fc": new},
            optimizers=trainer.optimizers,
            parameters={old.weight: [new[0].weight, new[1].weight]},
            averaged_models=averaged_models_of(trainer, pl_module),
        )
        entry = {"op": "tests/factor", "name": "net.fc", "rank": 2}
        self._after_surgery(trainer, pl_module, entry, "fc is two layers")


def same(first: Any, second: Any) -> bool:
    """Whether two nests of dicts, lists and tensors are equal to the last bit."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, Mapping):
        return list(first) == list(second) and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)
