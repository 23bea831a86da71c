"""Two ranks, started by the test beside it: ``python -m tests.distillation.ddp_script STRATEGY FOLDER``."""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_light.distillation import FeatureHint, KnowledgeDistillation, SoftTargets
from tests.contract.runs import checkpoints
from tests.distillation.runs import TEMPERATURE, WEIGHT, ByHand, Plain, fitted, mentor, weights


def apart(values: Tensor) -> float:
    held = [torch.zeros_like(values) for _ in range(2)]
    dist.all_gather(held, values)
    return float((held[0] - held[1]).abs().max())


def projected(module: Any) -> Tensor:
    (kept,) = vars(module)["_lightning_light_compression_state"].state["distillation"]["projectors"].values()
    return kept["weight"].detach().flatten().clone()


class HintedByHand(Plain):
    """A hint as one writes it by hand: the projector is a part of the module, and DDP takes care of it."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.projector = nn.Conv2d(6, 12, 1, bias=False)
        vars(self)["teacher"] = mentor().eval()

    def extra(self, student: Tensor, batch: Any) -> Tensor:
        with torch.no_grad():
            theirs = vars(self)["teacher"].conv1(batch[0])
        return F.mse_loss(self.projector(self.seen), theirs) / 2

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.net.conv1(x)
        return self.net.fc(F.relu(self.net.conv2(F.relu(self.net.bn1(self.seen)))).mean((2, 3)))


def main(strategy: str, folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    two: dict[str, Any] = {"devices": 2, "strategy": strategy}
    soft = SoftTargets(weight=WEIGHT, temperature=TEMPERATURE)
    by_hand = fitted(ByHand(), **two)
    ours = fitted(Plain(), KnowledgeDistillation(mentor, losses=[soft]), **two)
    losses: list[Any] = [soft, FeatureHint(feature_layers="net.conv1")]
    hinted = [KnowledgeDistillation(_as_module, losses=losses) for _ in range(3)]
    once = fitted(Plain(), hinted[0], max_epochs=1, limit_train_batches=1, **two)
    whole = fitted(Plain(), hinted[1], *checkpoints(folder), **two)
    again = fitted(Plain(), hinted[2], ckpt_path=folder / "epoch=0.ckpt", **two)
    every_fourth: dict[str, Any] = {**two, "accumulate_grad_batches": 4}
    hint = KnowledgeDistillation(_as_module, losses=[FeatureHint(feature_layers="net.conv1")])
    accumulated, expected = fitted(Plain(), hint, **every_fourth), fitted(HintedByHand(), **every_fourth)
    found = {
        "by_hand": float((weights(by_hand) - weights(ours)).abs().max()),
        "apart": apart(weights(whole)),
        "projector_apart": apart(projected(whole)),
        "accumulated": float((weights(accumulated) - weights(expected)[: len(weights(accumulated))]).abs().max()),
        "accumulated_projector": float((projected(accumulated) - expected.projector.weight.flatten()).abs().max()),
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
