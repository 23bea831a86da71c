"""Progress is read from real Trainers, of both hosts."""

import importlib
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_light.progress import progress_at_step, steps_done, steps_planned, training_progress

BATCHES = 5

pytestmark = pytest.mark.filterwarnings(  # Lightning's own
    "ignore:The '.*dataloader' does not have many workers", "ignore:.*LeafSpec:FutureWarning"
)


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def host(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(request.param)


class Points(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 2 * BATCHES

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((3,), float(index))


class Stream(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Any:
        return (torch.full((3,), float(index)) for index in range(2 * BATCHES))


class StatefulLoader(DataLoader[torch.Tensor]):
    """Goes on after the batch it had given out last."""

    skip = 0
    given = 0

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skip = state["given"] % BATCHES

    def __iter__(self) -> Any:
        skip, self.skip = self.skip, 0
        for index, batch in enumerate(super().__iter__()):
            self.given = index + 1
            if index >= skip:
                yield batch


def stateful_loader() -> StatefulLoader:
    return StatefulLoader(Points(), batch_size=2)


def make_module(host: ModuleType, *, optimizers: int = 1) -> Any:
    class Module(host.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(3, 1) for _ in range(optimizers))
            self.automatic_optimization = optimizers == 1

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor | None:
            if self.automatic_optimization:
                return self.layers[0](batch).square().mean()
            for layer, optimizer in zip(self.layers, self.optimizers(), strict=True):
                optimizer.zero_grad()
                self.manual_backward(layer(batch).square().mean())
                optimizer.step()
            return None

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(layer.parameters(), lr=0.001) for layer in self.layers]

    return Module()


def make_recorder(host: ModuleType) -> Any:
    class Recorder(host.Callback):  # type: ignore[name-defined, misc]
        """Progress at the start of every batch, and the planned steps seen there."""

        def __init__(self) -> None:
            self.seen: list[float] = []
            self.done: list[int] = []
            self.planned: list[int] = []
            self.at: list[float] = []
            self.ahead: list[float] = []

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.seen.append(training_progress(trainer))
            self.done.append(steps_done(trainer))
            self.planned.append(steps_planned(trainer))
            self.at.append(progress_at_step(trainer))
            self.ahead.append(progress_at_step(trainer, ahead=2))

    return Recorder()


def fit(host: ModuleType, module: Any = None, *callbacks: Any, loader: Any = None, ckpt_path: Any = None, **flags: Any):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    recorder = make_recorder(host)
    flags.setdefault("enable_checkpointing", False)
    trainer = host.Trainer(**quiet, callbacks=[recorder, *callbacks], **flags)
    loader = DataLoader(Points(), batch_size=2) if loader is None else loader
    trainer.fit(module or make_module(host), loader, ckpt_path=ckpt_path)
    return trainer, recorder


def test_one_optimizer(host: ModuleType) -> None:
    trainer, recorder = fit(host, max_epochs=2)
    assert recorder.seen == [step / 10 for step in range(10)]
    assert set(recorder.planned) == {10}
    assert recorder.at == [*recorder.seen[:-1], 1.0]  # nothing changes after the start of the last
    assert recorder.ahead == pytest.approx([*recorder.at[2:], 1.0, 1.0])
    assert (steps_done(trainer), training_progress(trainer)) == (10, 1.0)


def test_accumulation_counts_the_short_window_at_the_end_of_an_epoch(host: ModuleType) -> None:
    trainer, recorder = fit(host, max_epochs=2, accumulate_grad_batches=2)
    assert recorder.done == [0, 0, 1, 1, 2, 3, 3, 4, 4, 5]
    assert set(recorder.planned) == {6}
    assert training_progress(trainer) == 1.0


def test_accumulation_that_changes_between_epochs(host: ModuleType) -> None:
    scheduler = host.callbacks.GradientAccumulationScheduler({0: 5, 1: 2})
    trainer, recorder = fit(host, None, scheduler, max_epochs=3)
    assert set(recorder.planned) == {1 + 3 + 3}
    assert training_progress(trainer) == 1.0


@pytest.mark.parametrize("optimizers", [2, 3])
def test_manual_optimization_counts_a_batch_once(host: ModuleType, optimizers: int) -> None:
    trainer, recorder = fit(host, make_module(host, optimizers=optimizers), max_epochs=2)
    assert trainer.global_step == 10 * optimizers
    assert recorder.seen == [step / 10 for step in range(10)]
    assert set(recorder.planned) == {10}
    assert training_progress(trainer) == 1.0


def test_manual_optimization_with_max_steps(host: ModuleType) -> None:
    trainer, recorder = fit(host, make_module(host, optimizers=2), max_steps=8)
    assert recorder.seen == [0.0, 0.25, 0.5, 0.75]
    assert set(recorder.planned) == {4}
    assert training_progress(trainer) == 1.0


def test_the_nearer_of_two_ends_counts(host: ModuleType) -> None:
    _, by_steps = fit(host, max_epochs=2, max_steps=4)
    _, by_epochs = fit(host, max_epochs=2, max_steps=40)
    assert by_steps.seen == [0.0, 0.25, 0.5, 0.75]
    assert by_epochs.seen == [step / 10 for step in range(10)]


@pytest.mark.parametrize(
    ("flags", "planned"),
    [
        ({"fast_dev_run": 3}, 3),
        ({"limit_train_batches": 2, "max_epochs": 3}, 6),
        ({"overfit_batches": 1, "max_epochs": 7}, 7),
    ],
)
def test_shortened_runs(host: ModuleType, flags: dict[str, Any], planned: int) -> None:
    trainer = host.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False, **flags)
    seen: list[int] = []

    class Stop(host.Callback):  # type: ignore[name-defined, misc]
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            seen.append(steps_planned(trainer))
            trainer.should_stop = True

    trainer.callbacks.append(Stop())
    trainer.enable_progress_bar = False
    trainer.fit(make_module(host), DataLoader(Points(), batch_size=2))
    assert set(seen) == {planned}


def test_a_second_fit_goes_on(host: ModuleType) -> None:
    module = make_module(host)
    trainer, recorder = fit(host, module, max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    recorder.seen.clear()
    trainer.fit(module, DataLoader(Points(), batch_size=2))
    assert recorder.seen == [step / 10 for step in range(5, 10)]


def make_saver(host: ModuleType, hook: str, batch: int, path: Path) -> Any:
    """Saves from ``hook`` of the ``batch``-th batch, counted from 1 over the whole run."""

    class Saver(host.Callback):  # type: ignore[name-defined, misc]
        batches = 0

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.batches += 1
            self.save("on_train_batch_end", trainer)

        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            self.save("on_train_epoch_end", trainer)

        def save(self, moment: str, trainer: Any) -> None:
            if moment == hook and self.batches == batch:
                trainer.save_checkpoint(path)

    return Saver()


@pytest.mark.parametrize("optimizers", [1, 2])
@pytest.mark.parametrize(
    ("hook", "batch"),
    [("on_train_batch_end", 3), ("on_train_batch_end", 5), ("on_train_batch_end", 7), ("on_train_epoch_end", 5)],
)
def test_resume_goes_on_where_it_was(host: ModuleType, tmp_path: Path, optimizers: int, hook: str, batch: int) -> None:
    path = tmp_path / "saved.ckpt"
    saver = make_saver(host, hook, batch, path)
    _, whole = fit(host, make_module(host, optimizers=optimizers), saver, loader=stateful_loader(), max_epochs=2)
    trainer, rest = fit(
        host, make_module(host, optimizers=optimizers), loader=stateful_loader(), ckpt_path=path, max_epochs=2
    )
    assert whole.seen == [step / 10 for step in range(10)]
    assert rest.seen == whole.seen[batch:]
    assert rest.planned == whole.planned[batch:]
    assert training_progress(trainer) == 1.0


@pytest.mark.parametrize(
    ("flags", "loader"),
    [({"max_epochs": -1}, DataLoader(Points(), batch_size=2)), ({"max_epochs": 2}, DataLoader(Stream(), batch_size=2))],
)
def test_a_run_without_an_end_is_refused(host: ModuleType, flags: dict[str, Any], loader: Any) -> None:
    with pytest.raises(ValueError, match="expected a run with a planned end"):
        fit(host, loader=loader, **flags)


def test_data_of_unknown_length_with_max_steps(host: ModuleType) -> None:
    trainer, recorder = fit(host, loader=DataLoader(Stream(), batch_size=2), max_epochs=2, max_steps=4)
    assert recorder.seen == [0.0, 0.25, 0.5, 0.75]
    assert training_progress(trainer) == 1.0
    assert math.isinf(trainer.num_training_batches)
