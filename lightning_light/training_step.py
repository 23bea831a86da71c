"""Run the steps of a LightningModule as its forward pass, without anything that outlives it."""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from typing_extensions import override

from lightning_light.example_input import ExampleInput
from lightning_light.host.classes import loaded_hosts
from lightning_light.host.modules import STEP_AS_FORWARD, compiled_methods, trainer_of
from lightning_light.host.patches import InstancePatch, patches_of
from lightning_light.host.trainer import callbacks_of, silent_loggers
from lightning_light.isolation import uncompiled

__all__ = ["TRAINING_STEP", "callable_with", "overrides", "step_as_forward", "step_call"]

TRAINING_STEP = "training_step"

_TABLES = frozenset(vars(nn.Module()))
"""The attributes of `nn.Module` itself; `isolated` restores what is in them."""
_CONTAINERS = (list, dict, set, deque, defaultdict)
_SILENT = ("log", "log_dict", "print", "manual_backward", "toggle_optimizer", "untoggle_optimizer", "clip_gradients")


def step_call(module: nn.Module, batch: Any, step: str = TRAINING_STEP) -> ExampleInput | None:
    """Return the call of ``module.training_step``, or another step, on the first batch of a run.

    None for a step that draws its batches itself (``dataloader_iter``).
    """
    parameters = inspect.signature(getattr(module, step)).parameters
    if "dataloader_iter" in parameters:
        return None
    positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return ExampleInput((batch, 0) if len(positional) > 1 else (batch,), method=step)


def callable_with(module: nn.Module, example: ExampleInput) -> AbstractContextManager[None]:
    """Make ``module(*example.args)`` work: inside, for arguments of the training step, it runs that step.

    For ``forward`` it gets copies of objects, so that it may write into them.
    """
    if example.method == "forward" and not example.has_objects:
        return nullcontext()
    return step_as_forward(module, method=example.method)


@contextmanager
def step_as_forward(
    module: nn.Module, calls: Sequence[ExampleInput] = (), method: str = TRAINING_STEP
) -> Iterator[None]:
    """Inside, ``module(...)`` runs ``module.training_step(...)`` as it runs in training, or all ``calls`` in turn.

    The training step runs in the training modes that the modules have, other calls in evaluation mode. Nothing is
    logged, ``backward`` does nothing, optimizers do not step, and what the step writes in place into parameters, or
    into tensors and containers that modules hold, is written into copies. Wrappers that other methods have put around
    the step do not run. For functions that run the module inside `isolated`, which restores buffers and random states.

    Args:
        module: a LightningModule.
        calls: of its ``forward`` and its steps; ``module()`` then returns the results in a tuple.
        method: what ``module(...)`` runs without ``calls``.
    """
    modes = {inner: inner.training or not module.training for inner in module.modules()}
    original: Any = None

    def run(call: ExampleInput) -> Any:
        before = [(vars(inner), dict(vars(inner))) for inner in modes]
        del vars(module)["forward"]
        if original is not None:
            vars(module)["forward"] = original  # for a step that calls `self(...)`
        try:
            call = call.copied()
            if call.method == "forward":
                return module(*call.args, **call.kwargs)
            with _copied_tensors(module), _NoBackward(), silent_loggers(trainer_of(module)):
                for inner, training in modes.items():
                    vars(inner)["training"] = training and call.method == TRAINING_STEP
                vars(module).update(_inert_methods(module))
                return _run_step(module, call)
        finally:
            for live, attributes in before:
                live.clear()
                live.update(attributes)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return tuple(map(run, calls)) if calls else run(ExampleInput(args, kwargs, method))

    forward.__qualname__ = STEP_AS_FORWARD
    with uncompiled(module):
        original = vars(module).get("forward")
        patch = InstancePatch(module, "forward", forward)
        try:
            yield
        finally:
            patch.undo()


def overrides(owner: Any, method: str) -> bool:
    """Check whether a LightningModule or callback has a method of its own, not that of its Lightning base class."""
    root = getattr(getattr(type(owner), method, None), "__module__", "").partition(".")[0]
    return bool(root) and root not in {"torch", *(host.partition(".")[0] for host in loaded_hosts())}


def _run_step(module: Any, call: ExampleInput) -> Any:
    """Run a step and, for the training step, the module's own hooks around it, where averages are updated."""
    step = _unwrapped(module, call.method)
    if call.method != TRAINING_STEP:
        return step(*call.args)
    if overrides(module, "on_train_batch_start"):
        module.on_train_batch_start(call.args[0], 0)
    out = step(*call.args)
    if overrides(module, "optimizer_step") and module.automatic_optimization:
        module.optimizer_step(0, 0, _InertOptimizer(), lambda: None)
    if overrides(module, "on_before_zero_grad"):
        module.on_before_zero_grad(_InertOptimizer())
    outputs = {"loss": out} if isinstance(out, Tensor) else out
    for callback in _averaging_callbacks(module):
        with _unchanged(callback):
            callback.on_train_batch_end(trainer_of(module), module, outputs, call.args[0], 0)
    if overrides(module, "on_train_batch_end"):
        module.on_train_batch_end(outputs, call.args[0], 0)
    return out


def _averaging_callbacks(module: nn.Module) -> list[Any]:
    """Return the user's callbacks that act after a batch, if a part is frozen that has the shapes of a trained one."""
    frozen: set[Any] = set()
    trained: set[Any] = set()
    for part in module.modules():
        shapes = tuple((name, parameter.shape) for name, parameter in part.named_parameters())
        learning = [parameter.requires_grad for parameter in part.parameters()]
        if shapes and len(set(learning)) == 1:
            (trained if learning[0] else frozen).add(shapes)
    trainer = trainer_of(module)
    if trainer is None or not frozen & trained:
        return []
    own = [one for one in callbacks_of(trainer) if overrides(one, "on_train_batch_end")]
    return [one for one in own if not type(one).__module__.startswith("lightning_light.")]


@contextmanager
def _unchanged(callback: Any) -> Iterator[None]:
    """Restore the attributes of a callback, and the containers in them, afterwards."""
    before = dict(vars(callback))
    vars(callback).update({name: _copied(value) for name, value in before.items()})
    try:
        yield
    finally:
        vars(callback).clear()
        vars(callback).update(before)


def _unwrapped(module: nn.Module, step: str) -> Any:
    """Return a step as the user wrote it: below the patches of this package, and not compiled."""
    compiled = compiled_methods(module).get(step)
    patched = next((patch.original for patch in patches_of(module) if patch.name == step), None)
    return compiled or patched or getattr(module, step)


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
        self.optimizer = self

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
    return name not in _TABLES and isinstance(value, (Tensor, *_CONTAINERS))


def _copied(value: Any) -> Any:
    """Copy a tensor, or a container and the tensors and containers in it."""
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) not in _CONTAINERS:
        return value
    copied = copy.copy(value)
    if isinstance(copied, list | deque):
        for number, item in enumerate(copied):
            copied[number] = _copied(item)
    elif isinstance(copied, dict):
        copied.update({key: _copied(item) for key, item in copied.items()})
    return copied
