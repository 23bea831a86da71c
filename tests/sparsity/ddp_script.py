"""A script of two ranks, started by the test beside it: ``python -m tests.sparsity.ddp_script CASE FOLDER``."""

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_light as ll
from lightning_light.sparsity import SRSTE
from tests.contract.bodies import Momentum, module_class
from tests.contract.runs import DEFAULT_HOST, trainer
from tests.sparsity.runs import Look, leaks, masks_of
from tests.zoo import noise, tokens

CASES: dict[str, Callable[[], Any]] = {
    "taylor": lambda: ll.WeightPruning(ll.Sparsity(0.7), criterion=ll.Taylor(), calibration_batches=2, every_n_steps=2),
    "wanda": lambda: ll.WeightPruning(
        ll.Sparsity(0.7), criterion=ll.criteria.Wanda(), calibration_batches=2, scope="local"
    ),
    "sr_ste": lambda: SRSTE(targets=ll.Targets(exclude="features.stem")),
    "rigl": lambda: ll.DynamicSparseTraining(ll.Sparsity(0.7), every_n_steps=3),
    "set": lambda: ll.DynamicSparseTraining(ll.Sparsity(0.7), method=ll.sparsity.SET(), every_n_steps=3),
}


class Ranked(Momentum):
    """Each rank has data of its own."""

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:  # type: ignore[override]
        return DataLoader(TensorDataset(noise(64, 3, 8, 8), tokens(64, below=5)), batch_size=4)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(noise(8, 3, 8, 8), tokens(8, below=5)), batch_size=4)


def fit(case: str, folder: Path, ckpt_path: str | None = None) -> tuple[Any, Any, float]:
    worst = [0.0]

    def look(run: Any, module: Any) -> None:
        worst.append(leaks(run, module, masks_of(module, type(callback).method)))

    callback = CASES[case]()
    saving = ModelCheckpoint(folder, "e{epoch}", auto_insert_metric_name=False, save_top_k=-1)
    strategy = DDPStrategy(process_group_backend="gloo")
    watching = [] if case == "sr_ste" else [Look(look)]  # there gradients are dense on purpose
    run = trainer(callback, saving, *watching, devices=2, strategy=strategy, max_epochs=2)
    module = module_class(Ranked, DEFAULT_HOST)()
    run.fit(module, ckpt_path=ckpt_path)
    return run, module, max(worst)


def spread(tensors: list[Tensor]) -> float:
    """Return the largest difference between the ranks."""
    flat = torch.cat([tensor.detach().flatten().float() for tensor in tensors])
    held = [torch.zeros_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(held, flat)
    return float((held[0] - held[1]).abs().max())


def main(case: str, folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    _, module, worst = fit(case, folder)
    masks = masks_of(module, type(CASES[case]()).method)
    apart = [spread(list(module.parameters())), spread(list(masks.values()))]
    again = fit(case, folder / "again", str(folder / "e0.ckpt"))[1]
    resumed = all(torch.equal(a, b) for a, b in zip(again.parameters(), module.parameters(), strict=True))
    sparsity = ll.measure_sparsity(module).sparsity
    found = {"apart": apart, "leak": worst, "resumed": resumed, "sparse": sparsity > 0.4}
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
