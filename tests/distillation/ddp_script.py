"""Two ranks, started by the test beside it: ``python -m tests.distillation.ddp_script STRATEGY FOLDER``."""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_light.distillation import FeatureHint, KnowledgeDistillation, SoftTargets
from tests.contract.runs import checkpoints
from tests.distillation.runs import TEMPERATURE, WEIGHT, ByHand, Plain, fitted, mentor, weights


def apart(values: Tensor) -> float:
    held = [torch.zeros_like(values) for _ in range(2)]
    dist.all_gather(held, values)
    return float((held[0] - held[1]).abs().max())


def projected(module: Any) -> Tensor:
    (kept,) = vars(module)["_lightning_light_ledger"].state["distillation"]["projectors"].values()
    return kept["weight"].detach().flatten().clone()


def main(strategy: str, folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    two: dict[str, Any] = {"devices": 2, "strategy": strategy}
    soft = SoftTargets(weight=WEIGHT, temperature=TEMPERATURE)
    by_hand = fitted(ByHand(), **two)
    ours = fitted(Plain(), KnowledgeDistillation(teacher=mentor, losses=[soft]), **two)
    losses: list[Any] = [soft, FeatureHint(taps="net.conv1")]
    hinted = [KnowledgeDistillation(teacher=_as_module, losses=losses) for _ in range(3)]
    once = fitted(Plain(), hinted[0], max_epochs=1, limit_train_batches=1, **two)
    whole = fitted(Plain(), hinted[1], *checkpoints(folder), **two)
    again = fitted(Plain(), hinted[2], ckpt_path=folder / "epoch=0.ckpt", **two)
    found = {
        "by_hand": float((weights(by_hand) - weights(ours)).abs().max()),
        "apart": apart(weights(whole)),
        "projector_apart": apart(projected(whole)),
        "learned": not torch.equal(projected(once), projected(whole)),
        "resumed": torch.equal(weights(whole), weights(again)) and torch.equal(projected(whole), projected(again)),
    }
    (folder / f"rank{os.environ.get('LOCAL_RANK', '0')}.json").write_text(json.dumps(found))


def _as_module() -> Plain:
    """A teacher with the student's paths."""
    teacher = Plain()
    teacher.net = mentor()
    return teacher


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
