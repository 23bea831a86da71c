"""A callback that gathers every kind of evidence; run as a script, it does so on two ranks with data of their own."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any, TypedDict

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_light.callback import CompressionCallback
from lightning_light.criteria.collector import EvidenceCollector
from lightning_light.criteria.gathered import KINDS, EvidenceStorage
from lightning_light.order import Stage
from lightning_light.progress import steps_done
from lightning_light.surgery.averaged_models import averaged_models_of
from lightning_light.surgery.distributed import reduce_mean
from lightning_light.surgery.edit import cut
from tests.surgery.runs import Lit, halve, trainer
from tests.zoo import noise, tokens


class GatherState(TypedDict, total=False):
    """The state of the callback."""

    cut: bool
    evidence: EvidenceStorage


class Gather(CompressionCallback):
    """Gather from step ``start`` on, and cut half of a layer at step ``cut_at``."""

    method, stage, state_schema = "gather", Stage.STRUCTURED, GatherState

    def __init__(self, start: int = 2, cut_at: int | None = 5) -> None:
        self.start, self.cut_at = start, cut_at
        self.collector: EvidenceCollector | None = None

    @override
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_fit_start(trainer, pl_module)

        def storage() -> dict[str, Any]:
            return self.state(pl_module).setdefault("evidence", {})

        self.collector = EvidenceCollector(pl_module, None, KINDS, storage)

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        assert self.collector is not None
        state = self.state(pl_module)
        if self.cut_at is not None and steps_done(trainer) >= self.cut_at and "cut" not in state:
            state["cut"] = True
            kept = halve(pl_module, "net.conv1", "net.bn1", "net.conv2")
            edit = cut(
                pl_module,
                kept,
                optimizers=trainer.optimizers,
                averaged_models=averaged_models_of(trainer, pl_module),
            )
            self._after_surgery(trainer, pl_module, edit.entry(), "half of conv1 is gone", kept=kept)
        self.collector.begin_batch(gather=steps_done(trainer) >= self.start)

    @override
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        assert self.collector is not None
        self.collector.observe_step(p for group in optimizer.param_groups for p in group["params"])

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert self.collector is not None
        several = trainer.world_size > 1
        self.collector.end_batch((lambda tensor: reduce_mean(trainer, tensor)) if several else None)

    @override
    def on_surgery(self, trainer: Any, pl_module: Any, kept: Any) -> None:
        assert self.collector is not None
        self.collector.follow(kept)

    @override
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        if self.collector is not None:
            self.collector.remove()


class RankedLit(Lit):
    """A module whose ranks see different data."""

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(noise(64, 3, 8, 8), tokens(64, below=5)), batch_size=4)


def main(folder: Path) -> None:
    """Gather on two ranks and save what each of them has."""
    warnings.simplefilter("ignore")
    module, gather = RankedLit(), Gather()
    run = trainer(gather, max_steps=8, max_epochs=-1, devices=2, strategy=DDPStrategy(process_group_backend="gloo"))
    run.fit(module)
    torch.save(gather.state(module)["evidence"], folder / f"rank{run.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
