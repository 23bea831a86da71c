"""Attach a compression state to a module, so that it travels in the module's checkpoints.

Lightning loads the weights before any callback receives the checkpoint, so the structure travels through the
LightningModule's own ``on_save_checkpoint`` and ``on_load_checkpoint``, wrapped on the instance. They are bound
methods of functions that have the hooks' names: a deep copy binds them to itself, and a pickle falls back to the
class's own.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_light.host.modules import name_loader, trainer_of
from lightning_light.host.patches import InstancePatch, patches_of
from lightning_light.surgery.averaged_models import averaged_models_of
from lightning_light.surgery.manifest import KEY, naming_file
from lightning_light.surgery.operations import register_operation
from lightning_light.surgery.ownership import all_names, refuse_owned
from lightning_light.surgery.state import CompressionState, other_shapes
from lightning_light.surgery.structure import PRIVATE_PREFIX
from lightning_light.validation import validated

__all__ = [
    "LOADER",
    "CompressionState",
    "attach",
    "attach_if_kept",
    "check_owners",
    "detach",
    "has_state",
    "record",
    "recording",
    "register_operation",
    "release",
    "state_of",
    "states_of",
]

LOADER = "a compressed network, which `lightning_light.load_from_checkpoint(MyModule, path)` rebuilds"
"""What the checkpoint of a changed structure names as its loader."""

_STATE = f"{PRIVATE_PREFIX}_compression_state"
_HOOK = f"{PRIVATE_PREFIX}_hook"
_FOLLOWS = f"{PRIVATE_PREFIX}_follows"


@validated
def attach(module: nn.Module) -> CompressionState:
    """Return the compression state of ``module``, which from now on is in its checkpoints; the same one at every call.

    Args:
        module: a LightningModule, or any module whose state dicts shall be followed.
    """
    attributes = vars(module)
    if _STATE not in attributes:
        attributes[_STATE] = CompressionState(module)
    compression_state: CompressionState = attributes[_STATE]
    for wrapper in (on_save_checkpoint, on_load_checkpoint):
        if hasattr(type(module), wrapper.__name__):
            _patch(module, wrapper)
    attributes[_FOLLOWS] = True
    if _HOOK not in attributes:
        hook = module.register_load_state_dict_pre_hook(follow_state_dict)  # type: ignore[no-untyped-call]
        attributes[_HOOK] = hook
    return compression_state


def attach_if_kept(model: nn.Module) -> CompressionState | None:
    """Attach a compression state where checkpoints keep it: to a LightningModule, or a model that has one already."""
    is_lightning = hasattr(model, "on_save_checkpoint") and hasattr(model, "training_step")
    return attach(model) if is_lightning or has_state(model) else None


@contextmanager
def recording(model: nn.Module) -> Iterator[CompressionState]:
    """Attach a compression state for a change inside the block; afterwards, `release` a model that had none."""
    attached = has_state(model)
    yield attach(model)
    if not attached:
        release(model)


def _patch(module: nn.Module, hook: Callable[[Any, dict[str, Any]], None]) -> None:
    if getattr(vars(module).get(hook.__name__), "__func__", None) is not hook:
        InstancePatch(module, hook.__name__, types.MethodType(hook, module))


def record(
    module: nn.Module,
    averaged_models: Iterable[nn.Module],
    entry: Mapping[str, Any],
    kept: Mapping[str, Mapping[int, Tensor]] | None = None,
) -> None:
    """Record an operation in the compression states of ``module`` and of its averaged copies.

    Args:
        module: the live module, changed.
        averaged_models: its copies, changed in the same way.
        entry: as in `CompressionState.record`.
        kept: as in `CompressionState.record`.
    """
    compression_state = attach(module)
    compression_state.record(entry, kept=kept)
    for averaged_model in averaged_models:
        vars(averaged_model)[_STATE] = compression_state.averaged_copy()
        attach(averaged_model)


def state_of(module: nn.Module) -> CompressionState:
    """Return the compression state of ``module``, or an empty one that is not attached to it."""
    compression_state = vars(module).get(_STATE)
    return compression_state if isinstance(compression_state, CompressionState) else CompressionState(module)


def check_owners(model: nn.Module, layers: Iterable[str], *, method: str, stage: int, replaces: bool = False) -> None:
    """Refuse to let ``method`` change ``layers`` that a later method owns; surgery calls it too.

    A method also calls it when it plans, so that the refusal comes before its first change. The compression states of
    ``model`` and of the modules inside it count.

    Args:
        model: the root of all names.
        layers: names of the modules that are about to change.
        method: the one that is about to change them.
        stage: its stage.
        replaces: whether modules are replaced.

    Raises:
        UnsupportedError: names the layer, its owner, and the right order.
    """
    states = states_of(model)
    layers = all_names(model, layers) if states else []
    for path, state in states.items():
        prefix = f"{path}." if path else ""
        inside = [layer.removeprefix(prefix) for layer in layers if layer.startswith(prefix)]
        inside += [""] * (bool(path) and path in layers)
        refuse_owned(state.claims.values(), inside, method=method, stage=stage, replaces=replaces)


def states_of(model: nn.Module) -> dict[str, CompressionState]:
    """Return the compression states of ``model`` and of the modules inside it, by path."""
    return {path: state_of(module) for path, module in model.named_modules() if has_state(module)}


def has_state(module: nn.Module) -> bool:
    """Check whether ``module`` has a compression state, so that its own hooks are patched."""
    return _STATE in vars(module)


def release(module: nn.Module) -> None:
    """Remove what `attach` added, except the compression state and the two wrappers that later checkpoints need.

    A compressed network keeps the hook too, which then only explains why a state dict does not fit.
    """
    attributes = vars(module)
    attributes.pop(_FOLLOWS, None)
    if _HOOK in attributes and not state_of(module).edit_log:
        attributes.pop(_HOOK).remove()


def detach(module: nn.Module) -> None:
    """Remove everything that `attach` added, the compression state included."""
    release(module)
    vars(module).pop(_STATE, None)
    for patch in patches_of(module):
        if getattr(patch.value, "__func__", None) in (on_save_checkpoint, on_load_checkpoint):
            patch.undo()


def on_save_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
    """Call the module's own hook, then write the manifest."""
    compression_state = state_of(self)
    _call_original(self, "on_save_checkpoint", checkpoint)
    trainer = trainer_of(self)
    checkpoint[KEY] = compression_state.manifest(self, [] if trainer is None else trainer.optimizers)
    if compression_state.edit_log:
        name_loader(self, checkpoint, LOADER)


def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
    """Call the module's own hook, then take the checkpoint's structure, here and in averaged copies."""
    compression_state = state_of(self)
    _call_original(self, "on_load_checkpoint", checkpoint)
    trainer = trainer_of(self)
    with naming_file(getattr(trainer, "ckpt_path", None)):
        compression_state.load(self, checkpoint)
    for copy in averaged_models_of(trainer, self):
        attach(copy).load(copy, checkpoint)
        copy.load_state_dict(checkpoint.get("state_dict", {}), strict=False)


def _call_original(module: nn.Module, name: str, checkpoint: dict[str, Any]) -> None:
    """Call the hook of the user that ours replaces."""
    own = (on_save_checkpoint, on_load_checkpoint)
    for patch in patches_of(module):
        if patch.name == name and getattr(patch.value, "__func__", None) in own:
            patch.original(checkpoint)
            return
    getattr(type(module), name)(module, checkpoint)


def follow_state_dict(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
) -> None:
    """Let the structure follow the shapes of a bare state dict, or explain why they differ: a pre-hook."""
    own = {name: value for name, value in state_dict.items() if name.startswith(prefix)}
    if _FOLLOWS in vars(module):
        state_of(module).follow(module, own, prefix)
    different = state_of(module).edit_log and other_shapes(module, own, prefix)
    if different:
        lists[-1].append(
            f"`{type(module).__name__}` has been compressed, and {len(different)} tensors of the state dict, such as "
            f"`{different[0]}`, have other shapes. To rebuild the structure of a state dict use "
            "`lightning_light.restructure(model, state_dict, manifest)`, with `manifest = "
            "lightning_light.manifest_of(compressed_model)` saved beside it."
        )
