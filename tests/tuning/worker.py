"""One of the processes that drive a study; with the argument ``stuck`` its first trial never ends."""

import sys
import time
from typing import Any

import lightning as L

import lightning_light as ll
from tests.tuning.helpers import QUICK, Shuffled, pruning, seeded


class Stuck(L.Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        sys.stdout.write("in the middle of a trial\n")
        sys.stdout.flush()
        time.sleep(600)


def space(trial: Any) -> list[L.Callback]:
    return [*pruning(trial), *([Stuck()] if "stuck" in sys.argv else [])]


if __name__ == "__main__":
    options = {"objectives": {"val_loss": "min"}, "trials": 8, "trainer": QUICK, "grace_period": 5}
    ll.tune(seeded(), Shuffled(), space, storage=sys.argv[1], **options)
