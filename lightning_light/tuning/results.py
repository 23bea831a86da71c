"""What a study has found: its Pareto front as a table and a picture, and the best trial as YAML."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_light.errors import LightningLightError
from lightning_light.formatting import DataTable, human_count, plural
from lightning_light.report.figures import check_matplotlib, front_figure, has_matplotlib, svg
from lightning_light.tuning.study import error_of
from lightning_light.validation import validated

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from optuna import Study
    from optuna.trial import FrozenTrial

__all__ = ["TuningResult"]


@dataclass(frozen=True, repr=False)
class TuningResult:
    """The trials of a study; printed it is a table, in a notebook HTML.

    Attributes:
        study: Optuna's, for its own plots and importances.
        objectives: name -> ``"max"`` or ``"min"``.
        start: the ``state_dict`` from which every trial starts.
    """

    study: Study
    objectives: Mapping[str, str]
    start: Mapping[str, Tensor] = field(repr=False)

    @property
    def front(self) -> list[FrozenTrial]:
        """The trials that no other one beats in all objectives; the best in the first objective comes first."""
        trials = self.study.best_trials
        direction = -1.0 if next(iter(self.objectives.values())) == "max" else 1.0
        return sorted(trials, key=lambda trial: (direction * trial.values[0], trial.number))

    @property
    def best(self) -> FrozenTrial:
        """The trial that is best in the first objective.

        Raises:
            LightningLightError: no trial was completed.
        """
        if not self.front:
            errors = [error for trial in self.study.get_trials() if (error := error_of(trial))]
            raise LightningLightError(
                f"`tune(...)`: expected a completed trial, found none of {len(self.study.get_trials())}."
                + (f" The last was refused: {errors[-1]}" if errors else " Prune fewer trials, or run more.")
            )
        return self.front[0]

    def table(self) -> DataTable:
        """Return the completed trials with objectives and values, those of the Pareto front first and marked."""
        from optuna.trial import TrialState

        front = self.front
        trials = self.study.get_trials()
        completed = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        numbers = [trial.number for trial in front]
        others = [trial for trial in completed if trial.number not in numbers]
        names = sorted({name for trial in completed for name in trial.params})
        lines = [
            (
                f"{trial.number}{' *' if trial.number in numbers else ''}",
                *map(human_value, trial.values),
                *(human_value(trial.params[name]) if name in trial.params else "" for name in names),
            )
            for trial in (*front, *others)
        ]
        pruned = sum(trial.state == TrialState.PRUNED for trial in trials)
        refused = sum(error_of(trial) is not None for trial in trials)
        counts = {"pruned": pruned, "refused by a method": refused}
        notes = ["* Pareto front", *(f"{plural(count, 'trial')} {what}" for what, count in counts.items() if count)]
        headers = ("trial", *(f"{name} ({mode})" for name, mode in self.objectives.items()), *names)
        return DataTable(headers, tuple(lines), notes=tuple(notes), droppable=tuple(reversed(names)))

    def __str__(self) -> str:
        return str(self.table())

    def __repr__(self) -> str:
        return f"TuningResult({self.study.study_name!r}, {plural(len(self.study.get_trials()), 'trial')})"

    def _repr_html_(self) -> str:
        return self.table().html() + (svg(self.figure()) if has_matplotlib() else "")

    def figure(self, x: str | None = None, y: str | None = None) -> Figure:
        """Draw one objective against another, with Pareto front and best trial; for one objective, its value per trial.

        Args:
            x: an objective; None: the second one.
            y: an objective; None: the first one.

        Raises:
            UnsupportedError: matplotlib is not installed.
            ValueError: there is no such objective.
        """
        check_matplotlib("TuningResult.figure")
        names = list(self.objectives)
        if unknown := [name for name in (x, y) if name is not None and name not in names]:
            raise ValueError(f"`figure({unknown[0]!r})`: expected one of the objectives {names}.")
        down, across = names.index(y or names[0]), names.index(x or names[min(1, len(names) - 1)])

        def place(trial: FrozenTrial) -> tuple[float, float]:
            return (trial.number if down == across else trial.values[across]), trial.values[down]

        done = [place(trial) for trial in self.study.get_trials() if trial.state.name == "COMPLETE"]
        front, best = list(map(place, self.front)), place(self.best) if done else None
        labels = "trial" if down == across else names[across], names[down]
        joined = len(names) == 2  # more objectives are a surface, one is a point
        return front_figure(done, front, labels, name="trials", joined=joined, chosen=best)

    @validated
    def write_config(self, path: str | os.PathLike[str], trial: int | None = None) -> Path:
        """Write a trial as YAML for LightningCLI: ``fit --config best.yaml`` repeats its run.

        Beside it a file ``.start.ckpt`` holds the weights from which the trial started.

        Args:
            path: of the YAML file.
            trial: its number; None: the best one in the first objective.

        Raises:
            LightningLightError: no trial was completed.
            ValueError: there is no such trial.
        """
        import yaml

        trials = {one.number: one for one in self.study.get_trials() if "config" in one.user_attrs}
        number = self.best.number if trial is None else trial
        if number not in trials:
            raise ValueError(
                f"`write_config(trial={trial})`: expected the number of a trial, found none in {list(trials)}."
            )
        path = Path(path)
        weights = path.with_suffix(".start.ckpt")
        config = trials[number].user_attrs["config"]
        start, *methods = config["trainer"]["callbacks"]
        start = {**start, "init_args": {**start["init_args"], "weights": str(weights)}}
        config = {**config, "trainer": {**config["trainer"], "callbacks": [start, *methods]}}
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(dict(self.start), weights)
        values = ", ".join(f"{k}: {v}" for k, v in zip(self.objectives, trials[number].values or [], strict=False))
        text = yaml.safe_dump(config, sort_keys=False)
        path.write_text(f"# Trial {number} of the study {self.study.study_name!r}: {values}\n{text}")
        return path


def human_value(value: Any) -> str:
    """Format an objective or a parameter."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return human_count(value) if value >= 1000 else f"{value:.4g}"
