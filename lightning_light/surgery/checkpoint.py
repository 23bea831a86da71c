"""Load a compressed network without a Trainer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from typing_extensions import override

from lightning_light.atomic import atomic_save
from lightning_light.host.modules import BUILDER
from lightning_light.surgery.attachment import LOADER, attach, has_state, release, state_of
from lightning_light.surgery.manifest import KEY, naming_file
from lightning_light.validation import validated

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    _Base = LightningModule
    Module = TypeVar("Module", bound=LightningModule)
else:
    _Base = object
    Module = TypeVar("Module")

__all__ = ["CompressibleMixin", "load_from_checkpoint", "manifest_of", "restructure", "save_converted"]

_Network = TypeVar("_Network", bound=nn.Module)

_KEPT = (
    "epoch",
    "global_step",
    "pytorch-lightning_version",
    "hparams_name",
    "hyper_parameters",
    "hparams_type",
    "datamodule_hparams_name",
    "datamodule_hyper_parameters",
)

_PATCHING = threading.RLock()


@validated
def load_from_checkpoint(cls: type[Module], path: str | Path, **kwargs: Any) -> Module:
    """Load a compressed network: ``cls.load_from_checkpoint`` alone refuses one whose structure has changed.

    Hyper-parameters, ``map_location``, ``strict`` and the rest are Lightning's own; the class is left as it was.

    Args:
        cls: the LightningModule's class.
        path: a checkpoint, compressed or not.
        **kwargs: passed on to ``cls.load_from_checkpoint``.

    Raises:
        ManifestError: the checkpoint is of another network, or its manifest is damaged.
    """
    with naming_file(path), _restructuring(cls):
        loaded: Module = _load(cls.load_from_checkpoint, path, **kwargs)
        return loaded


def _load(load: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call Lightning's ``load_from_checkpoint``, which fails on the loader that a checkpoint names; then without it."""
    try:
        return load(*args, **kwargs)
    except (ValueError, ModuleNotFoundError) as error:
        if LOADER.partition(".")[0] not in str(error):
            raise
    return load(*args, **{**kwargs, BUILDER: None})


@contextmanager
def _restructuring(cls: type[Any]) -> Iterator[None]:
    """Let instances of ``cls`` take the checkpoint's structure before its weights, inside the block."""
    if issubclass(cls, CompressibleMixin):
        yield
        return
    own = vars(cls).get("on_load_checkpoint")
    original = cls.on_load_checkpoint

    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        original(self, checkpoint)
        _restructure(self, checkpoint)

    with _PATCHING:
        cls.on_load_checkpoint = on_load_checkpoint
        try:
            yield
        finally:
            if own is None:
                del cls.on_load_checkpoint
            else:
                cls.on_load_checkpoint = own


class CompressibleMixin(_Base):
    """Let plain ``MyModule.load_from_checkpoint(path)`` rebuild a compressed network.

    Not needed for training, nor for `load_from_checkpoint` of this package.

    Example:
        >>> import lightning as L
        >>> class MyModule(CompressibleMixin, L.LightningModule): ...
    """

    @classmethod
    @override
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint, compressed or not."""
        return _load(super().load_from_checkpoint, *args, **kwargs)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the checkpoint's structure before its weights; during a run the compression state does that already."""
        super().on_load_checkpoint(checkpoint)
        if not has_state(self):
            _restructure(self, checkpoint)


@validated
def manifest_of(model: nn.Module) -> dict[str, Any]:
    """Return what rebuilds the structure of a compressed network, in plain types and tensors.

    Checkpoints of a LightningModule contain it. A project with a save format of its own stores it beside the state
    dict, for `restructure`; ``torch.load(..., weights_only=True)`` reads it.

    Args:
        model: a network, compressed or not, whose changes are recorded: a LightningModule, or another module that
            `lightning_light.surgery.attach` was called on before it was compressed.

    Raises:
        ValueError: the changes of ``model`` are not recorded.
    """
    if not has_state(model) and not hasattr(model, "on_save_checkpoint"):
        raise ValueError(
            f"`manifest_of({type(model).__name__})`: expected a LightningModule, or a module whose changes are "
            "recorded, found neither. Call `lightning_light.surgery.attach(model)` before the model is compressed."
        )
    return state_of(model).manifest(model)


@validated
def restructure(model: _Network, state_dict: Mapping[str, Any], manifest: Mapping[str, Any]) -> _Network:
    """Give ``model`` the compressed structure that ``manifest`` describes, and load ``state_dict``.

    Args:
        model: as its class builds it, or compressed; changed in place.
        state_dict: of the compressed network.
        manifest: of the same network: what `manifest_of` returned, or the entry ``"lightning_light"`` of a checkpoint.

    Returns:
        ``model``.

    Raises:
        ManifestError: the manifest is of another network, damaged, or does not fit the state dict; nothing is changed.
        RuntimeError: of ``load_state_dict``, for names that are missing or unexpected.

    Example:
        >>> import copy
        >>> from lightning_light.lowrank import RankRatio, factorize
        >>> fresh = copy.deepcopy(module)
        >>> plan = factorize(module, next(iter(data))[0], RankRatio(0.2))
        >>> saved = {"weights": module.state_dict(), "structure": manifest_of(module)}
        >>> rebuilt = restructure(fresh, saved["weights"], saved["structure"])
        >>> rebuilt.state_dict().keys() == module.state_dict().keys() and len(plan.layers) > 0
        True
    """
    _restructure(model, {"state_dict": state_dict, KEY: manifest})
    model.load_state_dict(state_dict)
    return model


def save_converted(module: nn.Module, path: str | Path, out: str | Path) -> None:
    """Save ``module`` with the structure that it has now, and epoch and hyperparameters of the checkpoint it came from.

    Optimizers and loops start again, because their states belong to the old weights.

    Args:
        module: loaded from ``path``, and changed; its compression state is released.
        path: the finished checkpoint.
        out: the new one.
    """
    old = torch.load(path, map_location="cpu", weights_only=True)
    new = {key: old[key] for key in _KEPT if key in old}
    new["state_dict"] = module.state_dict()
    new[KEY] = attach(module).manifest(module)
    release(module)
    atomic_save(new, out)


def _restructure(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    attach(module).load(module, checkpoint)
    release(module)
