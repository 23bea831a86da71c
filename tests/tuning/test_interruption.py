"""A trial that is interrupted without a chance to tidy up is continued: nothing that was finished is done again."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_light as ll
from lightning_light.host.classes import Callback
from lightning_light.schedules import Linear, Window
from tests.contract.bodies import Body, module_class
from tests.tuning.helpers import numbers
from tests.zoo import noise, tokens

optuna = pytest.importorskip("optuna")

EPOCHS = 4


class PowerCut(BaseException):
    """Ends a trial as a kill does: the study gets no result, and the heartbeat stops."""


class Random(Body):
    """Training reads random numbers, and the learning rate a metric."""

    def make(self) -> None:
        super().make()
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(x)))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)  # type: ignore[attr-defined]
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5, factor=0.3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


class Cut(Callback):
    """Interrupt at the first of the given places; record the epochs that were finished."""

    def __init__(self, cuts: list[tuple[int, int]], finished: list[tuple[Any, int]], amount: Any) -> None:
        self.cuts, self.finished, self.amount = cuts, finished, amount

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) in self.cuts[:1]:
            raise PowerCut(self.cuts.pop(0))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.finished.append((self.amount, trainer.current_epoch))


class Rising(optuna.pruners.BasePruner):
    """Ends a trial after a value above an earlier one."""

    def prune(self, study: Any, trial: Any) -> bool:
        return bool(trial.intermediate_values[trial.last_step] > min(trial.intermediate_values.values()))


class Study:
    """Calls of `tune` that differ only in where they are interrupted."""

    def __init__(self, host: Any = lightning.pytorch, **options: Any) -> None:
        self.module = module_class(Random, host)()
        self.options = {"objectives": {"val_loss": "min"}, "trainer": {"max_epochs": EPOCHS}, "trials": 2, **options}
        self.finished: list[tuple[Any, int]] = []
        self.on_cut: Callable[[], object] = lambda: None

    def __call__(self, *cuts: tuple[int, int], **options: Any) -> Any:
        """Call `tune` until it is not interrupted; a cut at epoch -1 is in what is measured after the run."""
        left, self.finished = list(cuts), []

        def space(trial: Any) -> list[Any]:
            amount = trial.suggest_float("amount", 0.1, 0.9)
            pruning = ll.WeightPruning(ll.Sparsity(amount), schedule=Window(Linear(), start=0.2, end=0.8))
            return [pruning, Cut(left, self.finished, amount)]

        def measure(module: Any) -> dict[str, float]:
            if left[:1] == [(-1, 0)]:
                raise PowerCut(left.pop(0))
            weights = sum(one.detach().double().sum().item() for one in module.parameters())
            return {"weights": weights, "noise": torch.rand(()).item()}

        while True:
            try:
                return ll.tune(self.module, data, space, measure=measure, grace_period=1, **{**self.options, **options})
            except PowerCut:
                self.on_cut()


def data() -> tuple[Any, Any]:
    images = TensorDataset(noise(32, 3, 8, 8), tokens(32, below=5))
    return DataLoader(images, batch_size=8, shuffle=True), DataLoader(images, batch_size=8)


@pytest.fixture(autouse=True)
def quiet_optuna() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


HOSTS = [
    pytest.param(lightning.pytorch, {"max_epochs": EPOCHS}),
    pytest.param(pytorch_lightning, {"max_steps": 4 * EPOCHS}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("host", "length"), HOSTS)
def test_an_interrupted_trial_ends_as_if_it_had_not_been_and_repeats_no_epoch(
    host: Any, length: dict[str, int], tmp_path: Path
) -> None:
    objectives = {"val_loss": "min", "macs": "min", "weights": "min", "noise": "min"}
    study = Study(host, objectives=objectives, trainer=length)
    through, finished = numbers(study().study), study.finished
    assert len(finished) == len(set(finished)) == 2 * EPOCHS
    result = study((1, 2), (-1, 0), storage=tmp_path / "study.db")  # one trial and the next, before both continue
    assert sorted(numbers(result.study)) == sorted(through)
    assert sorted(study.finished) == sorted(finished)
    assert [path.name for path in tmp_path.iterdir()] == ["study.db"]


def test_what_was_reported_before_the_interruption_counts_for_the_pruner(tmp_path: Path) -> None:
    study = Study(pruner=Rising())
    through, finished = study().study.trials, study.finished
    assert [(trial.state.name, len(trial.intermediate_values)) for trial in through] == [("COMPLETE", 4), ("PRUNED", 3)]
    folder = tmp_path / "checkpoints"
    result = study((2, 1), (2, 1), storage=tmp_path / "study.db", checkpoints=folder, checkpoint_every_n_epochs=2)
    ended = [trial for trial in result.study.trials if trial.state.name != "FAIL"]
    before, after = ([(t.state, t.params, t.intermediate_values) for t in trials] for trials in (through, ended))
    assert sorted(after, key=str) == sorted(before, key=str)
    assert sorted(study.finished) == sorted(finished)
    assert not list(folder.iterdir())


@pytest.mark.slow
def test_a_checkpoint_that_is_damaged_or_not_there_is_named_and_the_trial_starts_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lightning.pytorch")

    def change_one_byte(path: Path) -> None:
        found = bytearray(path.read_bytes())
        found[len(found) // 2] ^= 1
        path.write_bytes(found)

    study, damages = Study(), [change_one_byte, Path.unlink]
    through, finished = numbers(study().study), study.finished
    study.on_cut = lambda: damages.pop()(max(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns))
    result = study((2, 1), (2, 1), storage=tmp_path / "study.db")
    assert sorted(numbers(result.study)) == sorted(through)
    assert sorted(study.finished) == sorted([*finished, *(one for one in finished if one[1] < 2)])
    assert caplog.text.count("started over: expected its checkpoint") == 2
    assert "found none that can be read (FileNotFoundError: " in caplog.text
    assert "found none that can be read (ValueError: another checksum of " in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["study.db"]
