"""Runs with masking callbacks: a Trainer over the contract's bodies, inspected after every step."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch
import torch

from lightning_light.surgery.attachment import state_of
from tests.contract.bodies import Body, module_class
from tests.contract.runs import trainer


class Look(lightning.pytorch.Callback):
    """Call ``look(trainer, module)`` after every batch; last in the list of callbacks."""

    def __init__(self, look: Callable[[Any, Any], None]) -> None:
        self.look = look

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.look(trainer, pl_module)


def masks_of(module: Any, key: str = "weight_pruning") -> dict[str, torch.Tensor]:
    return state_of(module).state.get(key, {}).get("masks", {})


def fitted(*callbacks: Any, body: type[Body] = Body, look: Any = None, **options: Any) -> tuple[Any, Any]:
    """Train three epochs of four batches; returns the Trainer and the module."""
    torch.manual_seed(3)
    module = module_class(body, lightning.pytorch)()
    run = trainer(*callbacks, *([Look(look)] if look else []), **options)
    run.fit(module)
    return run, module


def leaks(run: Any, module: Any, masks: dict[str, torch.Tensor]) -> float:
    """Return the largest weight, gradient or optimizer state under a mask."""
    found = [0.0]
    parameters = dict(module.named_parameters())
    for name, mask in masks.items():
        parameter = parameters[name]
        tensors = [parameter.detach(), *([parameter.grad] if parameter.grad is not None else [])]
        for optimizer in run.optimizers:
            state = optimizer.state.get(parameter, {})
            tensors += [v for v in state.values() if isinstance(v, torch.Tensor) and v.shape == parameter.shape]
        found += [float((tensor * ~mask).abs().max()) for tensor in tensors]
    return max(found)
