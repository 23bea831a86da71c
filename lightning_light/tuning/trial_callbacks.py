"""Callbacks of a trial: a checkpoint, from which another process continues it after a kill, and reports to a pruner."""

from __future__ import annotations

import os
import pickle
import secrets
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from lightning_light.atomic import atomic_write
from lightning_light.host.classes import Callback
from lightning_light.host.random_state import random_state, set_random_state
from lightning_light.host.trainer import start_with_an_epoch
from lightning_light.surgery.distributed import log_rank_zero
from lightning_light.surgery.stored_example import store_example

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_light.capture import Capture

__all__ = ["TrialCheckpoint", "TrialCheckpoints", "TrialReport"]

_KEY = "lightning_light_trial"
_UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, LookupError, pickle.UnpicklingError, zipfile.BadZipFile)
_FILE = "checkpoint"  # user attribute of a trial, which the trial that repeats it inherits


@dataclass(frozen=True)
class TrialCheckpoints:
    """Where the checkpoints of a study's trials are kept.

    Args:
        folder: that all processes of the study can read; None: no checkpoints.
        every_n_epochs: epochs from one checkpoint to the next.
    """

    folder: Path | None
    every_n_epochs: int

    @classmethod
    def beside(cls, storage: Any, folder: str | os.PathLike[str] | None, every_n_epochs: int) -> TrialCheckpoints:
        """Return ``folder``, or that of an SQLite file; none where the storage does not repeat a trial after a kill.

        Raises:
            ValueError: a folder is given for a storage that repeats none.
        """
        if getattr(storage, "heartbeat_interval", None) is None:
            if folder is not None:
                raise ValueError(
                    f"`tune(checkpoints={str(folder)!r})`: expected a storage with heartbeats, from which a killed "
                    'trial is continued, found another. Write `storage="study.db"`, or leave `checkpoints` out.'
                )
            return cls(None, every_n_epochs)
        if folder is None:
            from sqlalchemy import make_url

            url = make_url(storage.url)
            is_file = url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:")
            folder = Path(str(url.database)).parent if is_file else None
        return cls(Path(folder) if folder is not None and every_n_epochs else None, every_n_epochs)

    def of(self, trial: Any) -> TrialCheckpoint:
        """Return the callback for ``trial``; the name of its file is kept in the study."""
        if self.folder is None:
            return TrialCheckpoint(None)
        resume = _FILE in trial.user_attrs
        if not resume:
            trial.set_user_attr(_FILE, f"trial-{trial.number}-{secrets.token_hex(4)}.ckpt")
        return TrialCheckpoint(self.folder / trial.user_attrs[_FILE], self.every_n_epochs, resume=resume)

    def remove(self, trial: Any) -> None:
        """Remove the checkpoint of ``trial``, and what a killed process has left of writing it."""
        if self.folder is not None and _FILE in trial.user_attrs:
            path = self.folder / trial.user_attrs[_FILE]
            path.unlink(missing_ok=True)
            for part in self.folder.glob(f".{path.stem}.*"):
                shutil.rmtree(part, ignore_errors=True)


class TrialCheckpoint(Callback):
    """Write a checkpoint before an epoch begins, when all of the previous one is done, and after the last one.

    Unlike at the end of an epoch, learning-rate schedulers that read a metric have stepped then. Place it before all
    other callbacks: what they do at the start of an epoch is done again when the run is resumed.

    Args:
        path: of the file; None: no checkpoints.
        every_n_epochs: epochs from one checkpoint to the next.
        resume: whether the trial was interrupted before; the checkpoint is read at once.

    Attributes:
        stored: what the checkpoint of an interrupted trial holds beside its run; empty if the trial starts over.
        captured: the example input; set it before the run.
    """

    def __init__(self, path: Path | None, every_n_epochs: int = 1, *, resume: bool = False) -> None:
        self.path, self.every_n_epochs = path, every_n_epochs
        self.stored: dict[str, Any] = {}
        self.captured: Capture | None = None
        self._state: dict[str, Any] = {}
        self._note = ""
        if path is not None and resume:
            try:
                self.stored = _read(path)
                self._note = f"continued after {self.stored['epochs']} epochs, from {path}"
            except _UNREADABLE as error:
                reason = (str(error).splitlines() or [""])[0]
                found = f"none that can be read ({type(error).__name__}: {reason})"
                self._note = f"started over: expected its checkpoint {path}, found {found}"

    @property
    def resumed_from(self) -> Path | None:
        """The file from which the run continues; None if it begins."""
        return self.path if self.stored else None

    def metrics(self, trainer: Trainer) -> dict[str, float]:
        """Return all metrics that the trial has logged, before the interruption too."""
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        return {**self.stored.get("metrics", {}), **found}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the random state of the interrupted run, and end at once what it had ended."""
        if self._note:
            log_rank_zero(trainer, f"tune: an interrupted trial is {self._note}")
        if self.stored:
            set_random_state(self.stored["random_state"])
            trainer.should_stop = self.stored["ended"]
            start_with_an_epoch(trainer)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a checkpoint if it is due."""
        done = trainer.current_epoch
        if done > self.stored.get("epochs", 0) and done % self.every_n_epochs == 0:
            self._save(trainer, ended=False)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last checkpoint: what is measured after the run may take long."""
        if self.stored.get("ended"):
            set_random_state(self.stored["random_state"])
        else:
            self._save(trainer, ended=True)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what the trial needs beside the state of its run."""
        checkpoint[_KEY] = self._state

    def _save(self, trainer: Trainer, *, ended: bool) -> None:
        if self.path is None:
            return
        self._state = {"epochs": trainer.current_epoch, "ended": ended, "metrics": self.metrics(trainer)}
        self._state["random_state"] = random_state()
        store_example(self._state, self.captured)
        with atomic_write(self.path) as part:
            trainer.save_checkpoint(part, weights_only=False)


def _read(path: Path) -> dict[str, Any]:
    """Return what the checkpoint at ``path`` holds beside the run."""
    with zipfile.ZipFile(path) as archive:
        if part := archive.testzip():
            raise ValueError(f"another checksum of {part}")
    stored: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)[_KEY]
    return stored


class TrialReport(Callback):
    """Report ``metric`` to Optuna's pruner after every validation.

    Args:
        trial: of Optuna, in a study with one objective.
        metric: the objective, as the module logs it.

    Raises:
        optuna.TrialPruned: in the run, when the pruner ends the trial.
    """

    def __init__(self, trial: Any, metric: str) -> None:
        self.trial = trial
        self.metric = metric
        self._values: list[float] = []

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report, except after the sanity check and in validations in which the metric was not logged."""
        if trainer.sanity_checking or self.metric not in trainer.callback_metrics:
            return
        self._report(float(trainer.callback_metrics[self.metric]))
        if self.trial.should_prune():
            import optuna

            raise optuna.TrialPruned(f"after {len(self._values)} validations")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"values": list(self._values)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Report what the interrupted trial had reported before its checkpoint."""
        for value in state_dict["values"]:
            self._report(value)

    def _report(self, value: float) -> None:
        self.trial.report(value, len(self._values))
        self._values.append(value)
