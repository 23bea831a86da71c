"""`RunStart`: begin a run from given weights and random numbers."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy
import torch
from typing_extensions import override

from lightning_light.host.classes import Callback
from lightning_light.validation import NonNegativeInt, validated

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["RunStart"]


@validated
class RunStart(Callback):
    """Load weights and seed the random generators when ``fit`` begins, whatever was computed before.

    It makes a trial of `tune` and the run of its YAML file begin alike. Place it before all other callbacks. A run that
    is resumed continues with the weights and random states of its checkpoint.

    Args:
        weights: a file with a ``state_dict`` of the module; None: the weights stay.
        seed: of the generators of Python, NumPy and torch.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: the seed is negative.
    """

    def __init__(self, weights: str | None = None, seed: NonNegativeInt = 0) -> None:
        self.weights = weights
        self.seed = seed

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load and seed, before other callbacks read the weights and before loaders shuffle."""
        if stage != "fit":
            return
        if self.weights is not None:
            pl_module.load_state_dict(torch.load(self.weights, map_location="cpu", weights_only=True))
        random.seed(self.seed)
        numpy.random.seed(self.seed % 2**32)
        torch.manual_seed(self.seed)
