"""Short runs, second runs, and every way in which a checkpoint is read again."""

import copy
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_light
from lightning_light.surgery.attachment import state_of
from lightning_light.surgery.manifest import KEY
from tests.contract.case import Case
from tests.contract.runs import assert_changed, checkpoints, differences, module_of, shapes, trainer, unless_refused
from tests.contract.table import FULL

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
every_row = pytest.mark.parametrize("case", FULL)


@every_row
def test_a_trial_of_one_batch(case, tmp_path) -> None:
    with unless_refused(case, "fast_dev_run"):
        module = module_of(case)
        trainer(*case.build(tmp_path), fast_dev_run=True).fit(module)
        assert len(module.losses) == 1
        assert not list(tmp_path.rglob("*.*")), "a trial writes nothing"


@every_row
def test_fewer_batches_an_epoch(case, tmp_path) -> None:
    module = module_of(case)
    trainer(*case.build(tmp_path), limit_train_batches=3, max_epochs=5).fit(module)
    assert len(module.losses) == 15
    assert_changed(case, module)


@every_row
def test_a_run_that_is_counted_in_steps(case, tmp_path) -> None:
    module = module_of(case)
    trainer(*case.build(tmp_path), max_epochs=-1, max_steps=10).fit(module)
    assert len(module.losses) == 10
    assert_changed(case, module)


@every_row
def test_further_fits_with_the_same_callbacks(case, tmp_path) -> None:
    """Of the same module, which the second fit finds as the first has left it, and of another one."""
    callbacks, modules = case.build(tmp_path), [module_of(case), module_of(case)]
    torch.manual_seed(3)
    trainer(*callbacks).fit(modules[0])
    first, end = shapes(modules[0]), copy.deepcopy(modules[0].state_dict())
    with unless_refused(case, "second_fit"):
        trainer(*callbacks).fit(modules[0])
        assert len(modules[0].losses) == 24
        assert (shapes(modules[0]) == first) or case.structural
    torch.manual_seed(3)
    trainer(*callbacks).fit(modules[1])
    assert not differences(end, modules[1].state_dict()), "nothing of one network reaches the next"


@dataclass(frozen=True)
class Finished:
    """A run at its end, with its checkpoints in ``folder``; what the tests below read may be read in any order."""

    case: Case
    folder: Path
    run: Any
    module: Any

    @property
    def images(self) -> torch.Tensor:
        return self.module.train_dataloader().batches[0][0]


@pytest.fixture(scope="module")
def finished(request, tmp_path_factory) -> Finished:
    case, folder = request.param, tmp_path_factory.mktemp(request.param.name)
    torch.manual_seed(3)
    module = module_of(case)
    run = trainer(*case.build(folder), *checkpoints(folder, every=5))
    run.fit(module)
    run.save_checkpoint(folder / "after.ckpt")
    run.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    return Finished(case, folder, run, module)


of_finished_runs = pytest.mark.parametrize("finished", FULL, indirect=True)


@of_finished_runs
def test_checkpoints_load_without_a_trainer_and_weights_only(finished) -> None:
    module = finished.module
    for file in ("epoch=2", "after", "weights"):
        path = finished.folder / f"{file}.ckpt"
        assert KEY in torch.load(path, weights_only=True)
        loaded = lightning_light.load_from_checkpoint(type(module), path, weights_only=True)
        assert not differences(dict(module.state_dict()), dict(loaded.state_dict()))
        assert torch.equal(loaded.eval()(finished.images), module.eval()(finished.images))
        assert state_of(loaded).edit_log == state_of(module).edit_log


@of_finished_runs
def test_training_goes_on_from_a_checkpoint_of_weights_alone(finished) -> None:
    loaded = lightning_light.load_from_checkpoint(type(finished.module), finished.folder / "weights.ckpt")
    trainer(max_epochs=1).fit(loaded)
    assert shapes(loaded) == shapes(finished.module)


@of_finished_runs
def test_validate_and_test_with_checkpoints_forwards_and_backwards(finished) -> None:
    module, case = finished.module, finished.case
    end = shapes(module)
    for turn, file in enumerate(("epoch=0", "step=10", "step=5", "epoch=2")):
        path, fresh = finished.folder / f"{file}.ckpt", module_of(case)
        validated, tested = (module, fresh) if turn % 2 else (fresh, module)
        found = trainer(*case.build(finished.folder / "again")).validate(validated, ckpt_path=path, verbose=False)
        assert finished.run.test(tested, ckpt_path=path, verbose=False) == found
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert not differences(dict(saved), dict(module.state_dict())), file
        assert not differences(dict(saved), dict(fresh.state_dict())), file
        assert torch.equal(module.eval()(finished.images), fresh.eval()(finished.images))
    assert shapes(module) == end


@of_finished_runs
def test_a_fitted_module_can_be_copied_and_pickled(finished) -> None:
    """Nothing in it refers to the run."""
    module, run = finished.module, finished.module.trainer
    module.trainer = None
    try:
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert not differences(dict(module.state_dict()), dict(twin.state_dict()))
    finally:
        module.trainer = run
