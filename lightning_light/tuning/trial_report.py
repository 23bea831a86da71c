"""Report the metric of a trial after every validation, and end a trial that is not promising."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typing_extensions import override

from lightning_light.host.classes import Callback

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["TrialReport"]


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
