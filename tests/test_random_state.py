"""A resumed run shuffles, augments, and drops out as the uninterrupted run does, from every step and epoch."""

import json
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import lightning_light as ll
from lightning_light.host.random_state import KEY
from tests.contract.runs import differences
from tests.test_kill import script

pytestmark = pytest.mark.filterwarnings(
    "ignore:You're resuming from a checkpoint that ended",
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:The dirpath has changed from",
)


class Augmented(Dataset[Tensor]):
    """Samples with noise from every generator that a user's augmentation may use."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, place: int) -> Tensor:
        return torch.full((4,), float(place)) + random.random() + float(np.random.rand())


class Stream(IterableDataset[Tensor]):
    """Samples without a length, shuffled by the global generator."""

    def __iter__(self) -> Any:
        yield from torch.randn(22, 4).unbind()


class Regression(L.LightningModule):
    def __init__(self, loader: Any) -> None:
        super().__init__()
        self.loader = loader
        self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4))
        self.batches: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.batches.append(batch)
        return (self(batch) - batch.sin()).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self(batch).mean())

    def train_dataloader(self) -> Any:
        return self.loader()

    def val_dataloader(self) -> Any:
        return DataLoader(torch.ones(8, 4), batch_size=4)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def shuffled(workers: int = 0) -> DataLoader[Tensor]:
    return DataLoader(Augmented(), batch_size=4, shuffle=True, num_workers=workers)


def stream() -> DataLoader[Tensor]:
    return DataLoader(Stream(), batch_size=4)


def fitted(
    loader: Any, folder: Path, seed: int, resume: Path | None = None, save: bool = False, **options: Any
) -> Regression:
    """Three epochs of six batches; without ``resume``, a checkpoint after every step and every epoch."""
    L.seed_everything(seed)
    module = Regression(loader)
    saving: list[Any] = []
    if save or resume is None:
        steps, epochs = {"every_n_train_steps": 1, "filename": "{step}"}, {"filename": "{epoch}", "monitor": "val_loss"}
        saving = [L.callbacks.ModelCheckpoint(folder, save_top_k=-1, **each) for each in (steps, epochs)]
    options = {"limit_train_batches": 6} if loader is stream else options
    pruning = ll.WeightPruning(ll.Sparsity(0.5), every_n_steps=2)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=3,
        callbacks=[pruning, *saving],
        logger=False,
        enable_checkpointing=bool(saving),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, ckpt_path=resume)
    return module


@pytest.mark.parametrize(
    ("loader", "files", "options"),
    [
        (shuffled, ["step=2", "step=6", "step=9", "epoch=0"], {}),
        (stream, ["step=2", "step=6", "epoch=1"], {}),
        (shuffled, ["step=2", "step=3"], {"val_check_interval": 0.5}),
    ],
    ids=["shuffled", "stream", "validation within the epoch"],
)
def test_a_resumed_run_has_the_batches_and_the_weights_of_the_uninterrupted_one(
    loader: Any, files: list[str], options: dict[str, Any], tmp_path: Path
) -> None:
    whole = fitted(loader, tmp_path, seed=1, **options)
    assert not torch.equal(whole.batches[0], whole.batches[6])  # shuffled in every epoch
    for file in files:
        assert_equal(whole, fitted(loader, tmp_path, seed=2, resume=tmp_path / f"{file}.ckpt", **options), file)


@pytest.mark.parametrize(("first", "second"), [("step=2", "step=4"), ("step=2", "step=9"), ("epoch=0", "step=8")])
def test_a_run_that_is_interrupted_twice(first: str, second: str, tmp_path: Path) -> None:
    whole = fitted(shuffled, tmp_path / "whole", seed=1)
    fitted(shuffled, tmp_path / "again", seed=2, resume=tmp_path / "whole" / f"{first}.ckpt", save=True)
    assert_equal(whole, fitted(shuffled, tmp_path, seed=3, resume=tmp_path / "again" / f"{second}.ckpt"), second)


def assert_equal(whole: Regression, resumed: Regression, file: str) -> None:
    later = whole.batches[len(whole.batches) - len(resumed.batches) :]
    assert all(torch.equal(a, b) for a, b in zip(later, resumed.batches, strict=True)), file
    assert not differences(dict(whole.state_dict()), dict(resumed.state_dict())), file


def test_damaged_random_states_are_refused(tmp_path: Path) -> None:
    fitted(shuffled, tmp_path, seed=1)
    checkpoint = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    checkpoint[KEY][0]["current"]["torch"] = torch.zeros(3, dtype=torch.uint8)
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    with pytest.raises(ll.errors.ManifestError, match="The random state in the checkpoint"):
        fitted(shuffled, tmp_path, seed=2, resume=tmp_path / "damaged.ckpt")


@pytest.mark.slow
def test_each_of_two_processes_continues_with_its_own_random_numbers(tmp_path: Path) -> None:
    script("random_state_script", tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["differences"] == second["differences"]
    assert first["differences"] == {f: [] for f in ("step=2", "step=3", "step=7", "epoch=0", "epoch=1")}
    assert set(first["batches"]).isdisjoint(second["batches"])
