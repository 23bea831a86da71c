"""Run the training step of a LightningModule as its forward pass, without anything that outlives it."""

from __future__ import annotations

import copy
import inspect
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from typing_extensions import override

from lightning_light.host.classes import loaded_hosts
from lightning_light.host.modules import STEP_AS_FORWARD, trainer_of
from lightning_light.host.patches import InstancePatch

__all__ = ["step_arguments", "step_as_forward"]

_TABLES = frozenset(vars(nn.Module()))
"""The attributes of `nn.Module` itself; `isolated` restores what is in them."""
_SILENT = ("log", "log_dict", "print", "manual_backward", "toggle_optimizer", "untoggle_optimizer", "clip_gradients")


def step_arguments(module: nn.Module, batch: Any) -> tuple[Any, ...]:
    """Return the arguments that ``module.training_step`` takes for ``batch``, the first of a run."""
    parameters = inspect.signature(module.training_step).parameters.values()  # type: ignore[arg-type]
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return (batch, 0) if len(positional) > 1 else (batch,)


@contextmanager
def step_as_forward(module: nn.Module) -> Iterator[None]:
    """Inside, ``module(...)`` runs ``module.training_step(...)`` as it runs in training.

    Nothing is logged, ``backward`` does nothing, optimizers do not step, and what the step writes in place into
    parameters, or into tensors, lists, dicts and sets that modules hold, is written into copies. For functions that
    run the module inside `isolated`, which restores buffers and random states.

    Args:
        module: a LightningModule.
    """
    modes = {inner: inner.training or not module.training for inner in module.modules()}
    original = vars(module).get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        before = [(vars(inner), dict(vars(inner))) for inner in modes]
        del vars(module)["forward"]
        if original is not None:
            vars(module)["forward"] = original  # for a step that calls `self(...)`
        try:
            with _copied_tensors(module), _NoBackward():
                for inner, training in modes.items():
                    vars(inner)["training"] = training
                vars(module).update(_inert_methods(module))
                return _run_step(module, *args, **kwargs)
        finally:
            for live, attributes in before:
                live.clear()
                live.update(attributes)

    forward.__qualname__ = STEP_AS_FORWARD
    patch = InstancePatch(module, "forward", forward)
    try:
        yield
    finally:
        patch.undo()


def _run_step(module: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the step, and the module's own hooks after it, where copies of layers are updated."""
    out = module.training_step(batch, *args, **kwargs)
    if _overrides(module, "on_before_zero_grad"):
        module.on_before_zero_grad(_InertOptimizer())
    if _overrides(module, "on_train_batch_end"):
        module.on_train_batch_end({"loss": out} if isinstance(out, Tensor) else out, batch, 0)
    return out


def _overrides(module: nn.Module, hook: str) -> bool:
    """Check whether a LightningModule has a hook of its own."""
    owner = getattr(getattr(type(module), hook, None), "__module__", "").partition(".")[0]
    return bool(owner) and owner not in {root.partition(".")[0] for root in loaded_hosts()}


class _NoBackward(TorchFunctionMode):
    """Skip ``backward``; a gradient that the loss is computed from is a zero of the shape it has."""

    @override
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (Tensor.backward, torch.autograd.backward):
            return None
        if function is torch.autograd.grad:
            inputs = args[1] if len(args) > 1 else kwargs["inputs"]
            return tuple(torch.zeros_like(x) for x in ([inputs] if isinstance(inputs, Tensor) else inputs))
        return function(*args, **kwargs)


class _InertOptimizer:
    """An optimizer or a scheduler that does nothing."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = [{"lr": 0.0, "params": []}]
        self.state: dict[Any, Any] = {}

    def step(self, closure: Any = None, **kwargs: Any) -> Any:
        return None if closure is None else closure()

    def zero_grad(self, *args: Any, **kwargs: Any) -> None: ...

    @contextmanager
    def toggle_model(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        yield


def _inert_methods(module: nn.Module) -> dict[str, Any]:
    """Return methods for ``module`` that log nothing and drive no optimizer."""

    def nothing(*args: Any, **kwargs: Any) -> None: ...

    inert = [_InertOptimizer() for _ in range(_optimizer_count(module))]

    def optimizers(*args: Any, **kwargs: Any) -> Any:
        return inert[0] if len(inert) == 1 else inert

    def lr_schedulers() -> Any:
        return optimizers()

    methods: dict[str, Any] = dict.fromkeys(_SILENT, nothing)
    methods |= {"optimizers": optimizers, "lr_schedulers": lr_schedulers}
    return {name: method for name, method in methods.items() if hasattr(type(module), name)}


def _optimizer_count(module: nn.Module) -> int:
    """Count the optimizers of a manual optimization: the Trainer's, or without one those that are configured."""
    trainer = trainer_of(module)
    if trainer is not None or getattr(module, "automatic_optimization", True):
        return 1 if trainer is None else max(len(trainer.optimizers), 1)
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        made = module.configure_optimizers()  # type: ignore[operator]
    first = made[0] if isinstance(made, tuple) and made and isinstance(made[0], (list, tuple)) else made
    return len(first) if isinstance(first, (list, tuple)) else 1


@contextmanager
def _copied_tensors(module: nn.Module) -> Iterator[None]:
    """Inside, parameters have copies of their values, and tensors and containers that modules hold are copies."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        values = [(parameter, parameter.data) for parameter in module.parameters()]
        for parameter, value in values:
            parameter.data = value.clone()
        for inner in module.modules():
            vars(inner).update({name: _copied(value) for name, value in vars(inner).items() if _is_state(name, value)})
    try:
        yield
    finally:
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            for parameter, value in values:
                parameter.data = value


def _is_state(name: str, value: Any) -> bool:
    """Check whether an attribute is a tensor or a container, which the step may change in place."""
    return name not in _TABLES and (isinstance(value, Tensor) or type(value) in (list, dict, set, deque))


def _copied(value: Any) -> Any:
    """Copy a tensor, or a container and the tensors directly in it."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, list):
        return [item.clone() if isinstance(item, Tensor) else item for item in value]
    return copy.copy(value)
