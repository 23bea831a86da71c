"""Short runs, second runs, and every way in which a checkpoint is read again."""

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

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.parametrize("case", FULL),
]


def fitted(case: Case, folder: Path) -> tuple[Any, Any]:
    torch.manual_seed(3)
    module = module_of(case)
    run = trainer(*case.build(folder), *checkpoints(folder))
    run.fit(module)
    return run, module


def test_a_trial_of_one_batch(case, tmp_path) -> None:
    with unless_refused(case, "fast_dev_run"):
        module = module_of(case)
        trainer(*case.build(tmp_path), fast_dev_run=True).fit(module)
        assert len(module.losses) == 1
        assert not list(tmp_path.rglob("*.*")), "a trial writes nothing"


def test_fewer_batches_an_epoch(case, tmp_path) -> None:
    module = module_of(case)
    trainer(*case.build(tmp_path), limit_train_batches=3, max_epochs=5).fit(module)
    assert len(module.losses) == 15
    assert_changed(case, module)


def test_a_run_that_is_counted_in_steps(case, tmp_path) -> None:
    module = module_of(case)
    trainer(*case.build(tmp_path), max_epochs=-1, max_steps=10).fit(module)
    assert len(module.losses) == 10
    assert_changed(case, module)


def test_a_second_fit_with_the_same_callbacks(case, tmp_path) -> None:
    with unless_refused(case, "second_fit"):
        module, callbacks = module_of(case), case.build(tmp_path)
        trainer(*callbacks).fit(module)
        first = shapes(module)
        trainer(*callbacks).fit(module)
        assert len(module.losses) == 24
        assert (shapes(module) == first) or case.structural


def test_a_second_module_with_the_same_callbacks(case, tmp_path) -> None:
    callbacks, ends = case.build(tmp_path), []
    for _ in range(2):
        torch.manual_seed(3)
        module = module_of(case)
        trainer(*callbacks).fit(module)
        ends.append(module.state_dict())
    assert not differences(*ends), "what a callback remembers of one network does not reach the next"


def test_validate_and_test_with_checkpoints_forwards_and_backwards(case, tmp_path) -> None:
    run, module = fitted(case, tmp_path)
    end = shapes(module)
    images = module.train_dataloader().batches[0][0]
    for file in ("step=1", "step=12", "step=5", "epoch=0", "epoch=2"):
        fresh = module_of(case)
        for target in (module, fresh):
            tester = trainer(*case.build(tmp_path / "again"))
            found = tester.validate(target, ckpt_path=tmp_path / f"{file}.ckpt", verbose=False)
            again = run.test(target, ckpt_path=tmp_path / f"{file}.ckpt", verbose=False)
            assert found == again
        saved = torch.load(tmp_path / f"{file}.ckpt", weights_only=True)["state_dict"]
        assert not differences(dict(saved), dict(module.state_dict())), file
        assert not differences(dict(saved), dict(fresh.state_dict())), file
        assert torch.equal(module.eval()(images), fresh.eval()(images))
    assert shapes(module) == end


def test_checkpoints_load_without_a_trainer_and_weights_only(case, tmp_path) -> None:
    run, module = fitted(case, tmp_path)
    run.save_checkpoint(tmp_path / "after.ckpt")
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    images = module.train_dataloader().batches[0][0]
    for file in ("step=12", "after", "weights"):
        path = tmp_path / f"{file}.ckpt"
        assert KEY in torch.load(path, weights_only=True)
        loaded = lightning_light.load_from_checkpoint(type(module), path, weights_only=True)
        assert not differences(dict(module.state_dict()), dict(loaded.state_dict()))
        assert torch.equal(loaded.eval()(images), module.eval()(images))
        assert state_of(loaded).edit_log == state_of(module).edit_log


def test_training_goes_on_from_a_checkpoint_of_weights_alone(case, tmp_path) -> None:
    run, module = fitted(case, tmp_path)
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    loaded = lightning_light.load_from_checkpoint(type(module), tmp_path / "weights.ckpt")
    trainer(max_epochs=1).fit(loaded)
    assert shapes(loaded) == shapes(module)
