"""Run many short trainings with different methods and values, and compare them."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_light.budgets import Budget, Latency, MACs, Params, Size
from lightning_light.copies import copy_network
from lightning_light.errors import LightningLightError, UnsupportedError
from lightning_light.host.classes import host_class, is_host
from lightning_light.host.random_state import random_state, set_random_state
from lightning_light.surgery.stored_example import restore_or_capture_example
from lightning_light.tuning.configuration import as_config, callbacks_from, kept_arguments
from lightning_light.tuning.results import TuningResult
from lightning_light.tuning.run_start import RunStart
from lightning_light.tuning.space import draw, read_space
from lightning_light.tuning.study import (
    check_distributions,
    distributions_of,
    make_storage,
    open_study,
    run_study,
    sampler_of,
)
from lightning_light.tuning.trial_callbacks import TrialCheckpoint, TrialCheckpoints, TrialReport
from lightning_light.validation import NonNegativeInt, PositiveInt, validated

if TYPE_CHECKING:
    from optuna import Trial

__all__ = ["tune"]

_COSTS: dict[str, Budget] = {"macs": MACs(1.0), "params": Params(1.0), "bytes": Size(1), "seconds": Latency(1.0)}
_QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


@validated
def tune(
    module: nn.Module,
    data: Any,
    space: Callable[..., Any] | list[Any] | str | os.PathLike[str],
    *,
    objectives: Mapping[str, Literal["max", "min"]],
    trials: PositiveInt,
    trainer: Mapping[str, Any],
    measure: Callable[..., Any] | None = None,
    seed: NonNegativeInt = 0,
    storage: Any = None,
    name: str = "tune",
    sampler: Callable[..., Any] | None = None,
    pruner: Any = None,
    grace_period: PositiveInt = 60,
    checkpoints: str | os.PathLike[str] | None = None,
    checkpoint_every_n_epochs: NonNegativeInt = 1,
) -> TuningResult:
    """Search for methods and values by short trainings from the same weights, on Optuna.

    Every trial fits a copy of ``module`` with callbacks of its own, from the same weights and random numbers;
    ``module`` and the random generators are left as they are. Several processes may call it with the same ``storage``
    and ``name``: together they run ``trials`` trials. What a killed process was running is continued from its last
    checkpoint, once its heartbeat has been missing for ``grace_period`` seconds; a later call continues the study.

    Akiba et al., 2019, "Optuna: A Next-generation Hyperparameter Optimization Framework".
    https://arxiv.org/abs/1907.10902

    Args:
        module: a LightningModule with the weights to start from.
        data: a LightningDataModule, of which every trial gets a copy that shares datasets and tensors; or a function
            without arguments that returns what ``Trainer.fit`` takes. A data module that splits at random has to do so
            from a seed of its own.
        space: ``trial -> list of callbacks``, with values from ``trial.suggest_float(...)`` and the like; or a list in
            the notation of LightningCLI, or a YAML file with one, in which ranges stand in place of values:
            ``{low: 0.3, high: 0.8}``, ``{choices: [Magnitude, Taylor]}``.
        objectives: name -> ``"max"`` or ``"min"``. Names are metrics that the module logs, ``macs`` (per sample),
            ``params``, ``bytes`` (stored tensors), ``seconds`` (one forward pass on this machine), and keys of
            ``measure``.
        trials: of the whole study.
        trainer: arguments of the Trainer, plain values; ``max_epochs`` among them.
        measure: called with the trained module; returns further objectives by name, for instance the latency of an
            exported file.
        seed: of every training, and of the sampler.
        storage: an SQLite file, the URL of a database, or an object of ``optuna.storages``; None: in memory.
        name: of the study in the storage.
        sampler: called with ``seed=``, for instance ``optuna.samplers.NSGAIISampler``; None: ``TPESampler``.
        pruner: of ``optuna.pruners``, which ends trials by the objective after each validation; for one objective.
        grace_period: seconds without a heartbeat after which a trial counts as killed.
        checkpoints: the folder of the checkpoints of running trials, which all processes can read; None: that of the
            SQLite file; no checkpoints with a database server, nor where the storage has no heartbeats.
        checkpoint_every_n_epochs: epochs of a trial from one checkpoint to the next; 0: no checkpoints, a killed trial
            starts over.

    Returns:
        All trials of the study, with a table, the Pareto front, a picture, and the best trial as YAML.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, a pruner for several objectives, an objective that is not logged, or a
            folder of checkpoints for a storage without heartbeats.
        UnsupportedError: Optuna is not installed, or a trial would use several processes.
        LightningLightError: the storage has a study of that name with another space, trainer, seed or other weights.
    """
    _check(module, data, objectives, trainer, pruner)
    job = _Job(module, data, _callbacks_of(space, module), dict(objectives), dict(trainer), measure, seed)
    before = random_state()
    try:
        distributions = distributions_of(job.probe)
        description = {
            "space": None if callable(space) else read_space(space),
            "objectives": dict(objectives),
            "trainer": as_config(trainer),
            "seed": seed,
            "weights": _digest(module),
        }
        import optuna

        database = make_storage(storage, grace_period)
        kept = TrialCheckpoints.beside(database, checkpoints, checkpoint_every_n_epochs)
        study = open_study(
            name,
            description,
            [f"{mode}imize" for mode in objectives.values()],
            storage=database,
            sampler=sampler_of(sampler, seed),
            pruner=pruner or optuna.pruners.NopPruner(),
        )
        check_distributions(name, study, distributions)
        heartbeat = getattr(database, "heartbeat_interval", None) is not None
        run_study(
            study, lambda trial: job.run(trial, kept.of(trial)), trials, has_heartbeat=heartbeat, ended=kept.remove
        )
    finally:
        set_random_state(before)
    start = {key: value.detach().cpu().clone() for key, value in module.state_dict().items()}
    return TuningResult(study, dict(objectives), start)


@dataclass(frozen=True)
class _Job:
    """What all trials have in common."""

    module: nn.Module
    data: Any
    callbacks: Callable[[Any], list[Any]]
    objectives: dict[str, str]
    trainer: dict[str, Any]
    measure: Callable[..., Any] | None
    seed: int

    def config(self, callbacks: Sequence[Any]) -> dict[str, Any]:
        """One trial in LightningCLI's notation; model and data with the arguments that they keep."""
        parts = {"model": self.module, **({} if callable(self.data) else {"data": self.data})}
        arguments = {key: as_config(kept_arguments(part)[0]) for key, part in parts.items()}
        methods = as_config([RunStart(seed=self.seed), *callbacks])
        return {
            "seed_everything": self.seed,
            "trainer": {**as_config(self.trainer), "callbacks": methods},
            **{key: found for key, found in arguments.items() if found},
        }

    def probe(self, trial: Any) -> None:
        """Build callbacks once without training, and warn if they cannot be written as YAML."""
        try:
            self.config(self.callbacks(trial))
        except UnsupportedError as error:
            warnings.warn(f"{error} Trials run, but `write_config` cannot write them.", stacklevel=2)

    def run(self, trial: Trial, checkpoint: TrialCheckpoint) -> tuple[float, ...]:
        """Train once, or to the end of what an interrupted process has begun, and return the objectives."""
        callbacks = self.callbacks(trial)
        with suppress(UnsupportedError):  # of which `probe` has warned
            trial.set_user_attr("config", self.config(callbacks))
        reports = [TrialReport(trial, name) for name in self.objectives] if len(self.objectives) == 1 else []
        module = copy_network(self.module)
        captured = checkpoint.captured = restore_or_capture_example(module, checkpoint.stored)
        try:
            trainer = host_class(module, "Trainer")(
                **{**_QUIET, **self.trainer}, callbacks=[checkpoint, RunStart(seed=self.seed), *callbacks, *reports]
            )
            data = self.data() if callable(self.data) else _copy_data(self.data)
            _fit(trainer, module, data, checkpoint.resumed_from)
        finally:
            captured.remove()
        found = checkpoint.metrics(trainer)
        costs = {key: _COSTS[key] for key in _COSTS if key in self.objectives and key not in found}
        found |= {key: cost.measure(module, captured.example) for key, cost in costs.items()}
        found |= self._measured(module)
        return tuple(_finite(key, found) for key in self.objectives)

    def _measured(self, module: nn.Module) -> Mapping[str, float]:
        found = {} if self.measure is None else self.measure(module)
        if not isinstance(found, Mapping):
            raise TypeError(
                f"`tune(measure=...)`: expected a function that returns objectives by name, found one that returns "
                f"{type(found).__name__}. Return for instance `{{'milliseconds': 1.5}}`."
            )
        return found


def _check(module: Any, data: Any, objectives: Mapping[str, str], trainer: Mapping[str, Any], pruner: Any) -> None:
    """Refuse, before anything is trained, what cannot work."""
    try:
        import jsonargparse  # noqa: F401
        import optuna
    except ImportError as error:
        raise UnsupportedError(
            f"`tune(...)`: expected the packages optuna and jsonargparse, found that one cannot be imported ({error}). "
            "Install them: `pip install lightning-light[search]`."
        ) from error
    if not is_host(module, "LightningModule"):
        raise TypeError(f"`tune(module)`: expected a LightningModule, found {type(module).__name__}.")
    if not callable(data) and not is_host(data, "LightningDataModule"):
        raise TypeError(
            f"`tune(data=...)`: expected a LightningDataModule or a function without arguments, found "
            f"{type(data).__name__}. For loaders write `data=lambda: make_loaders()`, so that each trial has its own."
        )
    if not objectives:
        raise ValueError('`tune(objectives={})`: expected an objective. Write `objectives={"val_accuracy": "max"}`.')
    if pruner is not None and not isinstance(pruner, optuna.pruners.BasePruner):
        raise TypeError(
            f"`tune(pruner={pruner!r})`: expected an object of `optuna.pruners`, found {pruner!r}. Write "
            "`pruner=optuna.pruners.MedianPruner()`."
        )
    if pruner is not None and len(objectives) > 1:
        raise ValueError(
            f"`tune(objectives={dict(objectives)}, pruner=...)`: expected one objective, found {len(objectives)}, and "
            "Optuna prunes by one. Leave the pruner out, or tune one objective."
        )
    if "callbacks" in trainer:
        raise ValueError(
            '`tune(trainer={"callbacks": ...})`: expected callbacks in `space`, which makes new ones for every trial.'
        )
    if not {"max_epochs", "max_steps", "max_time"} & trainer.keys():
        raise ValueError('`tune(trainer={})`: expected the length of a trial. Write `trainer={"max_epochs": 5}`.')
    _refuse_several_processes(host_class(module, "Trainer")(**{**_QUIET, **trainer}))


def _callbacks_of(space: Any, module: nn.Module) -> Callable[[Any], list[Any]]:
    """Return the space as a function of a trial."""
    if not callable(space):
        tree = read_space(space)
        return lambda trial: callbacks_from(draw(tree, trial), module)

    def built(trial: Any) -> list[Any]:
        found = space(trial)
        if not isinstance(found, list | tuple) or not all(is_host(one, "Callback") for one in found):
            raise TypeError(f"`tune(space=function)`: expected a list of callbacks, found {type(found).__name__}.")
        return list(found)

    return built


def _fit(trainer: Any, module: nn.Module, data: Any, checkpoint: os.PathLike[str] | None) -> None:
    if is_host(data, "LightningDataModule"):
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    else:
        trainer.fit(module, *(data if isinstance(data, tuple) else (data,)), ckpt_path=checkpoint)


def _copy_data(data: Any) -> Any:
    """Copy a data module; datasets, arrays and tensors that it holds are shared."""
    shared = (Dataset, Tensor, numpy.ndarray)
    return copy.deepcopy(data, {id(value): value for value in vars(data).values() if isinstance(value, shared)})


def _refuse_several_processes(trainer: Any) -> None:
    if trainer.world_size > 1:
        raise UnsupportedError(
            f"`tune(trainer=...)`: expected trials of one process, found {trainer.world_size}. Write `devices=1`, and "
            "start several processes with the same `storage`."
        )


def _finite(name: str, found: Mapping[str, float]) -> float:
    """Return an objective.

    Raises:
        ValueError: it was not measured.
        LightningLightError: it is not finite, which fails the trial alone.
    """
    if name not in found:
        raise ValueError(
            f"`tune(objectives={{{name!r}: ...}})`: expected a logged metric, one of {sorted(_COSTS)}, or a key of "
            f"`measure`, found {sorted(found)}."
        )
    if not math.isfinite(found[name]):
        raise LightningLightError(f"`{name}` is {found[name]} after training.")
    return float(found[name])


def _digest(module: nn.Module) -> str:
    """A hash of the weights."""
    found = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
