"""Real Trainers, silent and small, and comparisons to the last bit."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
from torch import Tensor

from tests.contract.bodies import Body, module_class
from tests.contract.case import Case

DEFAULT_HOST: Any = lightning.pytorch


def module_of(case: Case, body: type[Body] | None = None, host: Any = DEFAULT_HOST) -> Any:
    """A new module; the same weights at every call."""
    return module_class(body or case.body, host)()


def trainer(*callbacks: Any, host: Any = DEFAULT_HOST, **options: Any) -> Any:
    """A silent Trainer of three epochs on one CPU."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 3,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(type(callback).__name__.endswith("Checkpoint") for callback in callbacks),
        "num_sanity_val_steps": 0,
        "limit_val_batches": 1,
        "limit_test_batches": 1,
    }
    return host.Trainer(callbacks=list(callbacks), **{**quiet, **options})


def checkpoints(folder: Path, host: Any = DEFAULT_HOST, every: int = 1) -> list[Any]:
    """Callbacks that save every few steps, ``step=3.ckpt``, and at the end of every epoch, ``epoch=1.ckpt``."""
    make = host.callbacks.ModelCheckpoint
    all_of_them = {"auto_insert_metric_name": False, "save_top_k": -1}
    by_step = make(folder, "step={step}", every_n_train_steps=every, **all_of_them)
    return [by_step, make(folder, "epoch={epoch}", every_n_epochs=1, save_on_train_epoch_end=True, **all_of_them)]


def shapes(module: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter."""
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def outcome(run: Any, module: Any) -> dict[str, Any]:
    """Everything that two equal runs have equal at their end."""
    return {
        "weights": module.state_dict(),
        "frozen": {name: parameter.requires_grad for name, parameter in module.named_parameters()},
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in run.lr_scheduler_configs],
        "step": run.global_step,
    }


def differences(first: Any, second: Any, path: str = "") -> list[str]:
    """Where two nests of dicts, lists and tensors are not equal to the last bit."""
    if isinstance(first, Tensor):
        equal = isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
        return [] if equal else [path]
    if isinstance(first, Mapping):
        if not isinstance(second, Mapping) or list(first) != list(second):
            return [f"{path}: other keys"]
        return [found for key, value in first.items() for found in differences(value, second[key], f"{path}.{key}")]
    if isinstance(first, list | tuple):
        if not isinstance(second, list | tuple) or len(first) != len(second):
            return [f"{path}: other length"]
        pairs = zip(first, second, strict=True)
        return [found for place, (a, b) in enumerate(pairs) for found in differences(a, b, f"{path}[{place}]")]
    return [] if first == second or first is second else [f"{path}: {first!r} is not {second!r}"]


@contextlib.contextmanager
def unless_refused(case: Case, contract: str) -> Iterator[None]:
    """Expect the contract to be met or, where the row refuses it, the sentence of the refusal."""
    if contract not in case.refuses:
        yield
        return
    with pytest.raises(Exception, match=case.refuses[contract]):  # the sentence is what counts
        yield


def assert_changed(case: Case, module: Any, body: type[Body] | None = None) -> None:
    """A structural method has changed the structure; any other has left it as it was."""
    fresh = module_of(case, body)
    if hasattr(fresh, "configure_model"):
        fresh.configure_model()
    fresh(next(iter(fresh.train_dataloader()))[0])  # lazy layers
    assert (shapes(module) != shapes(fresh)) == case.structural, f"{case}: {shapes(module)}"
