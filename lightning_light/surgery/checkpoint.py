"""Load a compressed network without a Trainer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from typing_extensions import override

from lightning_light.surgery.attachment import attach, has_state, release
from lightning_light.surgery.manifest import naming_file
from lightning_light.validation import validated

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    _Base = LightningModule
    Module = TypeVar("Module", bound=LightningModule)
else:
    _Base = object
    Module = TypeVar("Module")

__all__ = ["CompressibleMixin", "load_from_checkpoint"]

_PATCHING = threading.RLock()


@validated
def load_from_checkpoint(cls: type[Module], path: str | Path, **kwargs: Any) -> Module:
    """Load a compressed network: ``cls.load_from_checkpoint``, which alone builds the uncompressed structure.

    Hyper-parameters, ``map_location``, ``strict`` and the rest are Lightning's own; the class is left as it was.

    Args:
        cls: the LightningModule's class.
        path: a checkpoint, compressed or not.
        **kwargs: passed on to ``cls.load_from_checkpoint``.

    Raises:
        ManifestError: the checkpoint is of another network, or its manifest is damaged.
    """
    with naming_file(path), _restructuring(cls):
        return cls.load_from_checkpoint(path, **kwargs)


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

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the checkpoint's structure before its weights; during a run the compression state does that already."""
        super().on_load_checkpoint(checkpoint)
        if not has_state(self):
            _restructure(self, checkpoint)


def _restructure(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    attach(module).load(module, checkpoint)
    release(module)
