"""Two gloo processes with random numbers of their own: ``python -m tests.random_state_script FOLDER``.

Each rank writes to ``FOLDER/RANK.json`` in what its resumed runs differ from its uninterrupted one; started by
`test_random_state`.
"""

import json
import os
import sys
import warnings
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from tests.contract.runs import differences
from tests.test_random_state import Regression, fitted, shuffled


def loader() -> DataLoader[Tensor]:
    """Shuffled batches; the sampler that Lightning adds orders by this seed, which all processes share."""
    os.environ["PL_GLOBAL_SEED"] = "1"
    return shuffled()


def run(folder: Path, seed: int, resume: Path | None = None) -> Regression:
    """Three epochs of three batches per rank, with other random numbers on each rank."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    strategy = DDPStrategy(process_group_backend="gloo")
    return fitted(loader, folder, seed + 100 * rank, resume=resume, devices=2, strategy=strategy)


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    whole = run(folder, seed=1)
    found: dict[str, list[str]] = {}
    for file in ("step=2", "step=3", "step=7", "epoch=0", "epoch=1"):
        resumed = run(folder, seed=2, resume=folder / f"{file}.ckpt")
        later = whole.batches[len(whole.batches) - len(resumed.batches) :]
        same = all(torch.equal(a, b) for a, b in zip(later, resumed.batches, strict=True))
        found[file] = differences(dict(whole.state_dict()), dict(resumed.state_dict())) + ["batches"] * (not same)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    sums = [float(batch.sum()) for batch in whole.batches]
    (folder / f"{rank}.json").write_text(json.dumps({"differences": found, "batches": sums}))


if __name__ == "__main__":
    L.seed_everything(0)
    main(Path(sys.argv[1]))
