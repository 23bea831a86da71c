"""A script of two ranks, started by the test beside it: ``python -m tests.surgery.ddp_script FOLDER CASE...``."""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_light.callback import CompressionCallback
from lightning_light.capture import capture
from lightning_light.errors import RankMismatchError
from lightning_light.order import Stage
from lightning_light.progress import steps_done
from lightning_light.surgery.averaged_models import averaged_models_of
from lightning_light.surgery.distributed import broadcast, check_agreement, reduce_mean
from lightning_light.surgery.edit import cut
from tests.surgery.runs import Lit, halve, trainer
from tests.zoo import noise, tokens

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "views": {"gradient_as_bucket_view": True},
    "accumulate": {},
    "disagree": {},
}


class RankedLit(Lit):
    """Each rank has data of its own."""

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(noise(64, 3, 8, 8), tokens(64, below=5)), batch_size=4)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(noise(8, 3, 8, 8), tokens(8, below=5)), batch_size=4)


class Cuts(CompressionCallback):
    """Cut half of a layer twice, by what rank 0 sees; or, when it shall disagree, by what each rank sees."""

    method, stage = "cuts", Stage.STRUCTURED

    def __init__(self, disagree: bool) -> None:
        self.disagree = disagree
        self.wrapped: list[bool] = []

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        self.capture = capture(pl_module)
        means = reduce_mean(trainer, torch.tensor([float(trainer.global_rank), 3.0]))
        assert means.tolist() == [0.5, 3.0]
        check_agreement(trainer, "the means", {"means": means, "plain": [1, "a", None, (True, 2.5)]})

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        done = self.state(pl_module).setdefault("done", [])
        if batch_idx in (3, 6) and batch_idx not in done and trainer.current_epoch == 0:
            done.append(batch_idx)
            kept = halve(pl_module, "net.conv1", "net.bn1", "net.conv2")
            if self.disagree and trainer.global_rank == 1:
                width = pl_module.get_parameter("net.conv1.weight").shape[0]
                kept = {name: {d: (width - 1 - i).flip(0) for d, i in dims.items()} for name, dims in kept.items()}
            kept = kept if self.disagree else broadcast(trainer, kept)
            edit = cut(
                pl_module, kept, optimizers=trainer.optimizers, averaged_models=averaged_models_of(trainer, pl_module)
            )
            self._after_surgery(trainer, pl_module, edit.entry(), f"cut at {steps_done(trainer)}", kept=edit.kept)
            self.wrapped.append(isinstance(trainer.strategy.model, nn.parallel.DistributedDataParallel))


def spread(tensors: list[Tensor]) -> float:
    """How far the ranks are apart."""
    flat = torch.cat([tensor.detach().flatten().float() for tensor in tensors])
    held = [torch.zeros_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(held, flat)
    return float((held[0] - held[1]).abs().max())


def fit(case: str, folder: Path, ckpt_path: str | None = None) -> tuple[Any, Lit, Cuts]:
    callback = Cuts(disagree=case == "disagree")
    saving = ModelCheckpoint(folder, "e{epoch}", auto_insert_metric_name=False, save_top_k=-1)
    strategy = DDPStrategy(process_group_backend="gloo", **CASES[case])
    accumulate = 2 if case == "accumulate" else 1
    run = trainer(callback, saving, devices=2, strategy=strategy, max_epochs=2, accumulate_grad_batches=accumulate)
    module = RankedLit()
    run.fit(module, ckpt_path=ckpt_path)
    return run, module, callback


def found(case: str, folder: Path) -> dict[str, Any]:
    """What the test asserts, in plain types."""
    try:
        run, module, callback = fit(case, folder)
    except RankMismatchError as error:
        return {"error": str(error)}
    moments = [value for state in run.optimizers[0].state.values() for value in state.values() if value.ndim]
    apart = spread(list(module.parameters())), spread(moments)
    example = callback.capture.example
    assert example is not None
    shapes = [tuple(argument.shape) for argument in example.args]
    again = fit(case, folder / "again", str(folder / "e0.ckpt"))[1]
    resumed = all(torch.equal(a, b) for a, b in zip(again.parameters(), module.parameters(), strict=True))
    width = module.net.conv1.out_channels
    return {"apart": apart, "width": width, "shapes": shapes, "wrapped": callback.wrapped, "resumed": resumed}


def main(folder: Path, cases: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    for case in cases:
        (folder / f"{case}-{rank}.json").write_text(json.dumps(found(case, folder / case)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
