"""One of the processes that drive a study; with the argument ``stuck`` its first trial never ends."""

import sys
import time
from pathlib import Path
from typing import Any

import lightning as L

import lightning_light as ll
from tests.tuning.helpers import QUICK, Shuffled, pruning, seeded


class Stuck(L.Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if "stuck" in sys.argv and trainer.current_epoch == 1:
            sys.stdout.write("in the middle of an epoch\n")
            sys.stdout.flush()
            time.sleep(600)


class Record(L.Callback):
    """Append every finished epoch to a file."""

    def __init__(self, amount: float) -> None:
        self.amount = amount

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        with Path("epochs.txt").open("a") as file:
            file.write(f"{self.amount} {trainer.current_epoch}\n")


def space(trial: Any) -> list[L.Callback]:
    return [*pruning(trial), Stuck(), Record(trial.params["amount"])]


if __name__ == "__main__":
    options = {"objectives": {"val_loss": "min"}, "trials": 8, "trainer": QUICK, "grace_period": 5}
    ll.tune(seeded(), Shuffled(), space, storage=sys.argv[1], **options)
