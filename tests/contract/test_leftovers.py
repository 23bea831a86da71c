"""A run leaves nothing behind, says when it had no effect, and takes nothing that it does not need."""

import functools
import random
from typing import Any

import lightning.pytorch
import pytest
import torch
from torch import nn

from lightning_light.distillation import KnowledgeDistillation
from lightning_light.errors import NoEffectWarning
from tests.contract.bodies import Body, module_class
from tests.contract.runs import differences, module_of, trainer
from tests.contract.table import FULL

OURS = {"on_save_checkpoint", "on_load_checkpoint"}  # what later checkpoints need, on the LightningModule alone
HOOKS = [name for name in vars(nn.Module()) if "hooks" in name]


def traces(module: Any) -> dict[str, Any]:
    """Attributes, hooks and modes of every module, by its name."""
    found = {}
    for name, part in module.named_modules():
        attributes = {key for key in vars(part) if not key.startswith("_lightning_light")} - (
            OURS if not name else set()
        )
        explained = () if name else ("_load_state_dict_pre_hooks",)  # of a compressed network, for a state dict
        hooks = {key: len(vars(part)[key]) for key in HOOKS if key not in explained}
        found[name] = (sorted(attributes), hooks, part.training, type(part).__name__)
    return found


class Drawn(lightning.pytorch.Callback):
    """What the generators give at every step: nobody else may draw from them."""

    def __init__(self) -> None:
        self.states: list[Any] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.states.append((torch.get_rng_state(), random.getstate()))


def run_with_watch(body: type[Body], callbacks: list[Any]) -> tuple[Any, list[Any]]:
    """The module after a run, and what the generators gave at every step."""
    torch.manual_seed(3)
    random.seed(3)
    module, watch = module_class(body, lightning.pytorch)(), Drawn()
    trainer(*callbacks, watch).fit(module)
    return module, watch.states


@functools.cache
def plain_run(body: type[Body]) -> tuple[dict[str, Any], list[Any]]:
    """The same without a method."""
    module, states = run_with_watch(body, [])
    return traces(module), states


@pytest.mark.parametrize("case", FULL)
def test_no_hook_attribute_mode_or_random_number_is_left_changed(case, tmp_path) -> None:
    before = torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype()
    plain, drawn = plain_run(case.body)
    module, states = run_with_watch(case.body, case.build(tmp_path))
    found = traces(module)
    for name, (attributes, hooks, mode, kind) in plain.items():
        replaced = name in found and found[name][-1] != kind
        if not case.structural or (name in found and not replaced):
            assert found[name] == (attributes, hooks, mode, kind), name
    assert not differences(drawn, states)
    assert before == (torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype())
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("case", FULL)
def test_no_hook_is_left_after_an_error_in_training(case, tmp_path) -> None:
    class Stop(lightning.pytorch.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                raise RuntimeError("enough")

    plain, module = module_of(case), module_of(case)
    for callbacks, target in (([], plain), (case.build(tmp_path), module)):
        with pytest.raises(RuntimeError, match="enough"):
            trainer(*callbacks, Stop()).fit(target)
    assert {name: trace[1] for name, trace in traces(module).items() if name} == {
        name: trace[1] for name, trace in traces(plain).items() if name
    }


@pytest.mark.parametrize("case", FULL)
def test_a_run_without_a_planned_end_is_refused_and_leaves_the_module_as_it_was(case, tmp_path) -> None:
    """Also for a project that wraps ``fit`` and swallows the exception."""
    callback = case.build(tmp_path)[0]
    if callback.window(3) is None and not isinstance(callback, KnowledgeDistillation):
        pytest.skip("needs no end: it changes nothing")
    for options in ({"max_epochs": -1}, {"max_epochs": None, "max_time": {"hours": 1}}):
        module = module_of(case)
        before, weights = traces(module), {name: value.clone() for name, value in module.state_dict().items()}
        with pytest.raises(ValueError, match=r"expected a run with a planned end.*Set `max_steps`"):
            trainer(*case.build(tmp_path), **options).fit(module)
        assert traces(module) == before
        assert not [key for key in vars(module) if key in OURS or key.startswith("_lightning_light")]
        assert not differences(weights, dict(module.state_dict()))


class OutOfTime(lightning.pytorch.Callback):
    """Stops the run after its first batch, as ``max_time`` does."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = True


@pytest.mark.filterwarnings("ignore::lightning_light.errors.NoEffectWarning")
@pytest.mark.parametrize("case", FULL)
def test_a_run_that_is_stopped_before_the_last_change_says_so(case, tmp_path) -> None:
    callbacks = case.build(tmp_path)
    last = callbacks[0].last_change(3)
    if last is None or last < 0.2:
        pytest.skip("has no change that a run of one batch does not reach")
    with pytest.warns(UserWarning, match=f"`{type(callbacks[0]).__name__}`: .* it was stopped at 8%, by `max_time`"):
        trainer(*callbacks, OutOfTime()).fit(module_of(case))


@pytest.mark.parametrize("case", [row for row in FULL if row.values[0].no_effect])
def test_a_run_without_effect_says_so_by_name(case, tmp_path) -> None:
    callbacks = case.no_effect(tmp_path)
    with pytest.warns(NoEffectWarning, match=type(callbacks[0]).__name__):
        trainer(*callbacks).fit(module_of(case))
