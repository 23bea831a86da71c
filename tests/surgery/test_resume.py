"""Interrupted at any step and resumed is the same as uninterrupted, to the last bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_light.surgery.attachment import state_of
from lightning_light.surgery.manifest import KEY
from tests.surgery.runs import HOSTS, MODULES, Events, Lit, Loader, same, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*dataloader' does not have many workers",
    "ignore:.*LeafSpec:FutureWarning",
    "ignore:Be aware that when using `ckpt_path`",
)


def every_step(host: Any, folder: Path) -> Any:
    return host.callbacks.ModelCheckpoint(
        folder, "{step}", auto_insert_metric_name=False, save_top_k=-1, every_n_train_steps=1
    )


def whole_and_resumed(events: Any, make: Any, tmp_path: Path, host: Any, steps: range, **options: Any) -> None:
    whole = make()
    first = trainer(events(), every_step(host, tmp_path), host=host, **options)
    first.fit(whole, Loader())
    for step in steps:
        resumed, callback = make(), events()
        second = trainer(callback, host=host, **options)
        second.fit(resumed, Loader(), ckpt_path=tmp_path / f"{step}.ckpt")
        assert resumed.losses == whole.losses[step:], step
        assert same(resumed.state_dict(), whole.state_dict()), step
        assert same(second.optimizers[0].state_dict(), first.optimizers[0].state_dict()), step
        assert same(state_of(resumed).state, state_of(whole).state), step
        assert state_of(resumed).edit_log == state_of(whole).edit_log, step


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_cuts_and_a_factorization_resume_at_every_step(hook, optimizer, tmp_path) -> None:
    whole_and_resumed(
        lambda: Events(cuts=(2, 6), factor_at=5, hook=hook),
        lambda: Lit(optimizer),
        tmp_path,
        HOSTS[0],
        range(1, 12),
    )


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("early", [False, True])
def test_optimizers_made_early_or_ordered_by_name_resume(host, by_name, early, tmp_path) -> None:
    whole_and_resumed(
        lambda: Events(cuts=(2,), factor_at=5),
        lambda: MODULES[host](by_name=by_name, early=early),
        tmp_path,
        host,
        range(1, 12, 3),
    )


@pytest.mark.parametrize(
    "options", [{"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}, {"precision": "bf16-true"}]
)
def test_it_holds_under_accumulation_and_other_precisions(options, tmp_path) -> None:
    whole = Lit()
    first = trainer(Events(cuts=(1, 3), factor_at=2), every_step(HOSTS[0], tmp_path), **options)
    first.fit(whole, Loader())
    for step in range(2, first.global_step, 2):
        resumed = Lit()
        trainer(Events(cuts=(1, 3), factor_at=2), **options).fit(resumed, Loader(), ckpt_path=tmp_path / f"{step}.ckpt")
        assert same(resumed.state_dict(), whole.state_dict()), step


def test_every_checkpoint_loads_weights_only_and_carries_the_compression_state(tmp_path) -> None:
    run = trainer(Events(cuts=(2, 6), factor_at=5), every_step(HOSTS[0], tmp_path))
    run.fit(module := Lit(), Loader())
    run.save_checkpoint(tmp_path / "late.ckpt")
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == 14
    for file in files:
        assert KEY in torch.load(file, weights_only=True), file
    weights = torch.load(tmp_path / "weights.ckpt", weights_only=True)
    assert "callbacks" not in weights
    assert weights[KEY]["state"]["events"]["done"] == ["cut2", "factor", "cut6"]
    assert state_of(module).state["events"]["done"] == ["cut2", "factor", "cut6"]


def test_a_second_fit_goes_on_with_the_small_network() -> None:
    module, events = Lit(), Events(cuts=(2,))
    trainer(events).fit(module, Loader())
    trainer(events).fit(module, Loader())
    assert module.net.conv1.out_channels == 4
    assert events.acted == [(2, "cut2")]
    run = trainer(events, max_epochs=1)
    run.fit(module, Loader())
    run.fit_loop.max_epochs = 2
    run.fit(module, Loader())
    assert len(module.losses) == 8 * 4
