"""Copies and saves of others: the module is copied, pickled and saved in the middle of a run, and the copies work."""

import copy
import io
import pickle
from typing import Any

import lightning.pytorch
import pytest
import torch

from lightning_light.surgery.attachment import state_of
from tests.contract.runs import differences, module_of, outcome, trainer, unless_refused
from tests.contract.table import FULL


def saved(module: Any) -> Any:
    """Return what ``torch.save`` and ``torch.load`` make of ``module``."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = (copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), saved)


class Copies(lightning.pytorch.Callback):
    """Copies the module at chosen steps in three hooks, and trains each copy for a step."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step in (1, 10):
            self.copy(pl_module, batch)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step in (4, 7):
            self.copy(pl_module, next(iter(pl_module.train_dataloader())))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step in (6, 9):
            self.copy(pl_module, batch)

    def copy(self, module: Any, batch: Any) -> None:
        way = WAYS[self.count % len(WAYS)]
        self.count += 1
        with torch.random.fork_rng():
            twin = way(module)
            assert not differences(dict(module.state_dict()), dict(twin.state_dict()))
            assert twin.state_dict().keys() == module.state_dict().keys()
            twin.on_save_checkpoint({"state_dict": twin.state_dict()})
            twin.training_step(batch, 0).backward()
            for parameter in twin.parameters():
                if parameter.grad is not None:
                    parameter.data -= parameter.grad
            twin.eval()(batch[0])
            state_of(twin).state.clear()
            state_of(twin).edit_log.clear()


@pytest.mark.parametrize("case", FULL)
def test_a_module_is_copied_pickled_and_saved_in_the_middle_of_a_run(case, tmp_path) -> None:
    ends, states = [], []
    with unless_refused(case, "copies"):
        for beside in ([], [Copies()]):
            torch.manual_seed(3)
            module, callbacks = module_of(case), case.build(tmp_path)
            both = [*beside, *callbacks] if len(ends) == 1 else [*callbacks, *beside]
            run = trainer(*both)
            run.fit(module)
            ends.append(outcome(run, module))
            states.append(state_of(module).state)
    for end, state in zip(ends[1:], states[1:], strict=True):
        assert not differences(ends[0], end)
        assert not differences(states[0], state)
