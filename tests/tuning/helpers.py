"""A network and data with which a trial takes a tenth of a second."""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_light as ll
from lightning_light.schedules import OneShot
from tests.zoo import Boring

QUICK = {"max_epochs": 2, "accelerator": "cpu"}
SPACE = [
    {
        "class_path": "WeightPruning",
        "init_args": {
            "budget": {"class_path": "Sparsity", "init_args": {"amount": {"low": 0.1, "high": 0.9}}},
            "schedule": {"class_path": "OneShot", "init_args": {"at": {"choices": (0.25, 0.5)}}},
        },
    }
]


def pruning(trial: Any) -> list[L.Callback]:
    amount = trial.suggest_float("amount", 0.1, 0.9)
    return [ll.WeightPruning(ll.Sparsity(amount), schedule=OneShot(at=0.5))]


class Shuffled(L.LightningDataModule):
    """The data of `Boring`, shuffled in every epoch."""

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(Boring.data().dataset, batch_size=8, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return Boring.data()


class Small(Boring):
    """A perceptron with dropout: its training reads random numbers."""

    def __init__(self, width: int = 8) -> None:
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 5))
        super().__init__(net)
        self.save_hyperparameters()
        self.example_input_array = torch.zeros(1, 3, 8, 8)


def seeded(seed: int = 0) -> Small:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Small()


def numbers(study: Any) -> list[tuple[Any, ...]]:
    """The completed trials: values drawn and found, in order."""
    from optuna.trial import TrialState

    trials = study.get_trials(states=(TrialState.COMPLETE,))
    return [(tuple(sorted(trial.params.items())), tuple(trial.values)) for trial in trials]
