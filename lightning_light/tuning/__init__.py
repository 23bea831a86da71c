"""Tune methods and their values over many short runs, on Optuna: ``pip install lightning-light[search]``."""

from lightning_light.tuning.results import TuningResult
from lightning_light.tuning.tune import tune

__all__ = ["TuningResult", "tune"]
