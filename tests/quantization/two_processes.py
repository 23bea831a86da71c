"""Two ranks with data of their own: ``python -m tests.quantization.two_processes FOLDER``."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_light.quantization import LSQ, Int8, MinMax, MixedPrecision, MovingAverage, QuantizationAwareTraining
from tests.contract.bodies import Body, module_class
from tests.contract.runs import checkpoints, trainer
from tests.zoo import noise, tokens

ROOT = Path(__file__).parents[2]
RECIPE = MixedPrecision(default=LSQ(), first=Int8(observer=MovingAverage(0.5)), last=Int8(observer=MinMax()))


class Ranked(Body):
    """The sampler gives each rank every other sample, and the losses of a rank are its own."""

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(noise(64, 3, 8, 8), tokens(64, below=5)), batch_size=8)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(noise(8, 3, 8, 8), tokens(8, below=5)), batch_size=4)


def run_both(folder: Path) -> list[dict[str, Any]]:
    """What each rank has found."""
    command = [sys.executable, "-m", "tests.quantization.two_processes", str(folder)]
    environment = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "MASTER_PORT")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    files = [folder / f"rank{rank}.json" for rank in (0, 1)]
    assert all(file.exists() for file in files), done.stderr[-3000:]
    return [json.loads(file.read_text()) for file in files]


def fit(folder: Path, ckpt_path: Path | None = None) -> tuple[Any, Any, dict[str, Any]]:
    torch.manual_seed(0)
    stages: dict[str, Any] = {"start": 0.2, "freeze_observers": 0.8, "freeze_batch_norm": 0.9}
    qat = QuantizationAwareTraining(RECIPE, calibration_batches=2, **stages)
    module: Any = module_class(Ranked, pl)()
    examples: list[Any] = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if (found := qat.state(pl_module).get("example")) is not None:
                examples.append(list(found["args"][0].shape))

    saving = checkpoints(folder) if ckpt_path is None else []
    run = trainer(
        Look(),
        qat,
        *saving,
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        use_distributed_sampler=True,
    )
    run.fit(module, ckpt_path=ckpt_path)
    return run, module, {**qat.state(module), "example": examples[0] if examples else None}


def tensors(module: Any, state: dict[str, Any]) -> Tensor:
    return torch.cat(
        [t.detach().flatten().float() for t in (*module.parameters(), state["ranges"], *state["learned"].values())]
    )


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    run, module, state = fit(folder)
    mine = tensors(module, state)
    held = [torch.zeros_like(mine) for _ in range(2)]
    dist.all_gather(held, mine)
    _, again, resumed = fit(folder / "again", folder / "epoch=1.ckpt")
    found = {
        "apart": float((held[0] - held[1]).abs().max()),
        "resumed": float((tensors(again, resumed) - mine).abs().max()),
        "enabled": state["enabled"],
        "example": state["example"],
    }
    (folder / f"rank{run.global_rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
