"""Studies of Optuna that several processes may drive: nothing is lost or repeated when one of them is killed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from lightning_light.errors import LightningLightError
from lightning_light.warning_filters import ignored_warnings

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

__all__ = [
    "Objective",
    "check_distributions",
    "distributions_of",
    "error_of",
    "make_storage",
    "open_study",
    "run_study",
    "sampler_of",
]

Objective = Callable[["Trial"], "tuple[float, ...]"]

_DESCRIPTION = "lightning_light"  # user attribute of a study
_ERROR, _NOT_COUNTED = "error", "not counted"  # user attributes of a trial
_EXPERIMENTAL = ".* is (an )?experimental"
_RETRIES = 3


class _Surplus(Exception):  # noqa: N818  # a signal, no error
    """Another process has started the last trial of the study a moment earlier."""


def make_storage(storage: Any, grace_period: int) -> Any:
    """Return Optuna's storage for a path of an SQLite file or a URL, with heartbeats; other storages as they are.

    Args:
        storage: a path, a URL of a database, an object of ``optuna.storages``, or None for memory.
        grace_period: seconds without a heartbeat after which a trial counts as killed, and is run again.

    Raises:
        ValueError: the database cannot be opened.
    """
    if not isinstance(storage, str | os.PathLike):
        return storage
    from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
    from sqlalchemy.exc import SQLAlchemyError

    url = str(storage)
    if "://" not in url:
        Path(url).parent.mkdir(parents=True, exist_ok=True)
        url = f"sqlite:///{os.path.abspath(url)}"
    try:
        with ignored_warnings(_EXPERIMENTAL):
            return RDBStorage(
                url,
                engine_kwargs={"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None,
                heartbeat_interval=max(1, grace_period // 5),
                grace_period=grace_period,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=_RETRIES),
            )
    except SQLAlchemyError as error:
        raise ValueError(
            f"`tune(storage={str(storage)!r})`: expected the path of an SQLite file or the URL of a database, found "
            f"one that cannot be opened ({str(error).splitlines()[0]}). Give another path or URL."
        ) from error


def sampler_of(make: Callable[..., BaseSampler] | None, seed: int) -> BaseSampler:
    """Return a sampler that starts over in every trial, from a seed of its own.

    So one process that is interrupted and resumed draws what it would have drawn, and no two processes draw the same.

    Args:
        make: called with ``seed=``; None for Optuna's ``TPESampler``.
        seed: of the study; that of a trial is made of it and the trial's place in the study.
    """
    from optuna.samplers import BaseSampler, TPESampler

    build = make or TPESampler

    class Reseeded(BaseSampler):  # type: ignore[misc]  # untyped where Optuna is not installed
        def before_trial(self, study: Any, trial: FrozenTrial) -> None:
            trials = study.get_trials(deepcopy=False)
            place = sum(_root(one) == one.number < _root(trial) for one in trials)  # repeated ones do not count
            own = numpy.random.SeedSequence([seed, place]).generate_state(1)
            self._sampler = build(seed=int(own[0]))
            self._sampler.before_trial(study, trial)

        def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> Any:
            return self._sampler.infer_relative_search_space(study, trial)

        def sample_relative(self, study: Any, trial: FrozenTrial, search_space: Any) -> Any:
            return self._sampler.sample_relative(study, trial, search_space)

        def sample_independent(self, study: Any, trial: FrozenTrial, name: str, distribution: Any) -> Any:
            return self._sampler.sample_independent(study, trial, name, distribution)

        def after_trial(self, study: Any, trial: FrozenTrial, state: Any, values: Any) -> None:
            self._sampler.after_trial(study, trial, state, values)

    return Reseeded()


def open_study(name: str, description: Mapping[str, Any], directions: list[str], **options: Any) -> Study:
    """Create a study or continue the one of that name.

    Args:
        name: of the study in its storage.
        description: what all its trials share, in plain types.
        directions: of the objectives.
        options: ``storage``, ``sampler`` and ``pruner``.

    Raises:
        LightningLightError: the study of that name has another description.
    """
    import optuna

    study = optuna.create_study(study_name=name, directions=directions, load_if_exists=True, **options)
    description = json.loads(json.dumps(description))  # as storages return it, with lists for tuples
    if _DESCRIPTION not in study.user_attrs and not study.get_trials(deepcopy=False):
        study.set_user_attr(_DESCRIPTION, description)
    found = study.user_attrs.get(_DESCRIPTION, {})
    if differ := [key for key, value in description.items() if found.get(key) != value]:
        raise _other_study(name, ", ".join(f"`{key}`" for key in differ))
    return study


def distributions_of(space: Callable[[Any], object]) -> dict[str, Any]:
    """Return the ranges of one trial of ``space``: by name, each as Optuna writes it.

    Raises:
        ValueError: there is none, so that all trials would be equal.
    """
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
    finally:
        optuna.logging.set_verbosity(verbosity)
    space(trial)
    if not trial.distributions:
        raise ValueError(
            "`tune(space=function)`: expected a function that draws at least one value, found one that draws none. "
            'Write for instance `trial.suggest_float("remaining", 0.3, 0.8)`.'
        )
    return dict(trial.distributions)


def check_distributions(name: str, study: Study, distributions: Mapping[str, Any]) -> None:
    """Refuse a space whose ranges are not those of the trials that the study has.

    Raises:
        LightningLightError: a parameter has another range, or none has the name of one in the study.
    """
    known = {key: found for trial in study.get_trials(deepcopy=False) for key, found in trial.distributions.items()}
    differ = [key for key, found in distributions.items() if key in known and known[key] != found]
    if differ or (known and not known.keys() & distributions.keys()):
        raise _other_study(name, f"the range of `{differ[0]}`" if differ else f"parameters {sorted(known)}")


def run_study(
    study: Study, objective: Objective, trials: int, *, has_heartbeat: bool, ended: Callable[[Any], None]
) -> None:
    """Run trials until the study has ``trials`` of them, together with other processes.

    A trial whose process was killed is run again with the same values once its heartbeat has stopped for long enough.
    A trial that a method refuses by an error of this package counts, as failed; after any other error, which ends the
    call, a trial is drawn again in the next call. ``ended`` is called with every trial that ends in this process.
    """
    from optuna.storages import fail_stale_trials
    from optuna.trial import TrialState

    def once(trial: Trial) -> tuple[float, ...]:
        mine = _root(study.get_trials(deepcopy=False)[trial.number])
        if sum(root < mine for root in _counted(study)) >= trials:
            trial.set_user_attr(_NOT_COUNTED, True)
            raise _Surplus
        try:
            return objective(trial)
        except LightningLightError as error:
            trial.set_user_attr(_ERROR, str(error))
            raise
        except (Exception, KeyboardInterrupt) as error:
            import optuna

            if not isinstance(error, optuna.TrialPruned):
                trial.set_user_attr(_NOT_COUNTED, True)
                ended(trial)
            raise

    with ignored_warnings(_EXPERIMENTAL):
        while True:
            fail_stale_trials(study)
            states = {trial.state for trial in study.get_trials(deepcopy=False)}
            if TrialState.WAITING in states or len(_counted(study)) < trials:
                stored = [lambda _, trial: ended(trial)]  # called when the study has the result
                study.optimize(once, n_trials=1, catch=(LightningLightError, _Surplus), callbacks=stored)
            elif TrialState.RUNNING in states and has_heartbeat:
                time.sleep(0.5)  # of another process, which may be killed yet
            else:
                return


def error_of(trial: FrozenTrial) -> str | None:
    """Return why a method refused a trial; None if none did."""
    error: str | None = trial.user_attrs.get(_ERROR)
    return error


def _counted(study: Study) -> set[int]:
    """Numbers of the trials that count, without repetitions of killed ones."""
    trials = study.get_trials(deepcopy=False)
    return {_root(trial) for trial in trials} - {_root(trial) for trial in trials if _NOT_COUNTED in trial.user_attrs}


def _root(trial: Any) -> int:
    """The number of a trial, or of the one that it repeats."""
    return int(trial.system_attrs.get("failed_trial", trial.number))


def _other_study(name: str, found: str) -> LightningLightError:
    return LightningLightError(
        f"`tune(name={name!r})`: expected a study of the same space, objectives, trainer, seed and weights in this "
        f"storage, found another: {found}. Give another `name`; a module starts with the same weights if it is loaded "
        "from a checkpoint, or built after a seed."
    )
