"""The edit log's operations, and what puts it into a module's checkpoints.

Lightning loads the weights before any callback hears of the checkpoint, so the structure travels through the
LightningModule's own ``on_save_checkpoint`` and ``on_load_checkpoint``, wrapped on the instance. They are bound
methods of functions that have the hooks' names: a deep copy binds them to itself, and a pickle falls back to the
class's own.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_light.surgery.averaged_models import averaged_models_of
from lightning_light.surgery.manifest import KEY
from lightning_light.surgery.operations import register_operation
from lightning_light.surgery.state import CompressionState
from lightning_light.surgery.structure import PRIVATE_PREFIX

__all__ = ["CompressionState", "attach", "has_state", "state_of", "record", "register_operation", "release"]

_STATE = f"{PRIVATE_PREFIX}_compression_state"
_HOOK = f"{PRIVATE_PREFIX}_hook"


def attach(module: nn.Module) -> CompressionState:
    """The compression state of ``module``, which from now on travels in its checkpoints; the same one at every call.

    Args:
        module: a LightningModule, or any module whose state dicts shall be followed.
    """
    attributes = vars(module)
    if _STATE not in attributes:
        attributes[_STATE] = CompressionState(module)
    compression_state: CompressionState = attributes[_STATE]
    for wrapper in (on_save_checkpoint, on_load_checkpoint):
        if hasattr(type(module), wrapper.__name__):
            _wrap(module, compression_state, wrapper)
    if _HOOK not in attributes:
        hook = module.register_load_state_dict_pre_hook(follow_state_dict)  # type: ignore[no-untyped-call]
        attributes[_HOOK] = hook
    return compression_state


def _wrap(
    module: nn.Module, compression_state: CompressionState, wrapper: Callable[[Any, dict[str, Any]], None]
) -> None:
    name = wrapper.__name__
    found = vars(module).get(name)
    function = getattr(found, "__func__", None)
    if function is wrapper:
        return
    if found is not None and function is not getattr(type(module), name):  # the class's own is what a pickle leaves
        compression_state.wrapped[name] = found
    vars(module)[name] = types.MethodType(wrapper, module)


def record(
    module: nn.Module,
    averaged_models: Iterable[nn.Module],
    entry: Mapping[str, Any],
    kept: Mapping[str, Mapping[int, Tensor]] | None = None,
) -> None:
    """Write an operation into the compression state of ``module`` and of its averaged copies, which have one history.

    Args:
        module: the live module, changed.
        averaged_models: its copies, changed likewise.
        entry: as in `CompressionState.record`.
        kept: as in `CompressionState.record`.
    """
    compression_state = attach(module)
    compression_state.record(entry, kept=kept)
    for averaged_model in averaged_models:
        vars(averaged_model)[_STATE] = compression_state.twin()
        attach(averaged_model)


def state_of(module: nn.Module) -> CompressionState:
    """The compression state of ``module``, or an empty one that is nowhere kept: asking changes nothing."""
    compression_state = vars(module).get(_STATE)
    return compression_state if isinstance(compression_state, CompressionState) else CompressionState(module)


def has_state(module: nn.Module) -> bool:
    """Whether ``module`` has a compression state, so that its own hooks are wrapped."""
    return _STATE in vars(module)


def release(module: nn.Module) -> None:
    """Take back what `attach` did, but for the compression state and the two wrappers that later checkpoints need."""
    handle = vars(module).pop(_HOOK, None)
    if handle is not None:
        handle.remove()


def on_save_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
    """The module's own hook, then the manifest."""
    compression_state = state_of(self)
    _call_wrapped(self, compression_state, "on_save_checkpoint", checkpoint)
    trainer = getattr(self, "_trainer", None)
    checkpoint[KEY] = compression_state.manifest(self, [] if trainer is None else trainer.optimizers)


def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
    """The module's own hook, then the structure that the weights will be loaded into, here and in averaged copies."""
    compression_state = state_of(self)
    _call_wrapped(self, compression_state, "on_load_checkpoint", checkpoint)
    compression_state.load(self, checkpoint)
    for copy in averaged_models_of(getattr(self, "_trainer", None), self):
        attach(copy).load(copy, checkpoint)
        copy.load_state_dict(checkpoint.get("state_dict", {}), strict=False)


def _call_wrapped(module: Any, compression_state: CompressionState, name: str, checkpoint: dict[str, Any]) -> None:
    wrapped = compression_state.wrapped.get(name)
    if wrapped is not None:
        wrapped(checkpoint)
    else:
        getattr(type(module), name)(module, checkpoint)


def follow_state_dict(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *_: Any
) -> None:
    """A ``load_state_dict`` pre-hook: where no manifest is at hand, structure follows the shapes of the tensors."""
    state_of(module).follow(
        module, {name: value for name, value in state_dict.items() if name.startswith(prefix)}, prefix
    )
