"""A compressed network in a sharded run, `ModelParallelStrategy` with FSDP2 on two ranks.

``python -m tests.sharded_script FOLDER`` prints one line of JSON: what differs between an uninterrupted and a resumed
run with a teacher, the widths of the network, and how every other method is refused.
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import lightning_light as ll
from lightning_light.errors import LightningLightError
from tests.contract.bodies import Body, Loader, module_class
from tests.contract.cases.distillation import MENTOR
from tests.contract.runs import differences, trainer
from tests.contract.table import CASES
from tests.kill_script import forked


class Sharded(Body):
    """Shards its layers where there is a device mesh."""

    def configure_model(self) -> None:
        mesh = self.device_mesh  # type: ignore[attr-defined]
        if mesh is None or isinstance(self.head.weight, DTensor):
            return
        for module in (self.features, self.head, self):
            fully_shard(module, mesh=mesh["data_parallel"])


def fit(module: Any, *callbacks: Any, ckpt_path: Path | None = None) -> Any:
    """Each rank has batches of its own."""
    torch.manual_seed(3)
    strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False, process_group_backend="gloo")
    run = trainer(*callbacks, devices=2, strategy=strategy)
    module.train_dataloader = lambda: Loader(turn=run.global_rank)
    run.fit(module, ckpt_path=ckpt_path)
    return run


def prune(folder: Path) -> None:
    module = module_class(Sharded, lightning.pytorch)()
    run = trainer(ll.StructuredPruning(ll.Channels(0.5)))
    run.fit(module)
    run.save_checkpoint(folder / "small.ckpt")


def distil(folder: Path, resume: Path | None, end: str) -> None:
    module = ll.load_from_checkpoint(module_class(Sharded, lightning.pytorch), folder / "small.ckpt", weights_only=True)
    saving = ModelCheckpoint(folder, "step={step}", auto_insert_metric_name=False, save_top_k=-1, every_n_train_steps=1)
    run = fit(module, ll.KnowledgeDistillation(MENTOR), *([] if resume else [saving]), ckpt_path=resume)
    assert isinstance(module.head.weight, DTensor)
    run.save_checkpoint(folder / f"{end}.ckpt")


def refusals(folder: Path) -> None:
    """How the first row of every method, and a checkpoint of another structure, is refused."""
    found: dict[str, str] = {}
    for case in CASES:
        name = type(case.build(Path(tempfile.gettempdir()))[0]).__name__
        if case.full and name not in found and case.name != "distillation_soft_targets":
            found[name] = _error(module_class(Sharded, lightning.pytorch)(), *case.build(folder))
    resumed = module_class(Sharded, lightning.pytorch)()
    found["checkpoint"] = _error(resumed, ll.KnowledgeDistillation(MENTOR), ckpt_path=folder / "step=6.ckpt")
    (folder / "refusals.json").write_text(json.dumps(found))


def _error(module: Any, *callbacks: Any, ckpt_path: Path | None = None) -> str:
    try:
        fit(module, *callbacks, ckpt_path=ckpt_path)
    except LightningLightError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for world, function in (
        (1, lambda: prune(folder)),
        (2, lambda: distil(folder, None, "whole")),
        (2, lambda: distil(folder, folder / "step=6.ckpt", "resumed")),
        (2, lambda: refusals(folder)),
    ):
        if any(forked(world, folder, function)):
            raise SystemExit("\n".join(path.read_text() for path in folder.glob("error-*.txt")))
    whole, resumed = (torch.load(folder / f"{end}.ckpt", weights_only=True) for end in ("whole", "resumed"))
    parts = ("state_dict", "optimizer_states", "lightning_light", "global_step")
    found = {
        "differs": [name for part in parts for name in differences(whole[part], resumed[part], part)],
        "stem": whole["state_dict"]["features.stem.weight"].shape[0],
        "refused": json.loads((folder / "refusals.json").read_text()),
    }
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
