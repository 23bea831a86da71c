"""Support both class trees of Lightning: `lightning.pytorch` and `pytorch_lightning`.

They are separate classes of the same code. A project uses either or, through its dependencies, both. `Callback` is a
callback of each, and `is_host` checks for a class of whichever is loaded.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING

__all__ = ["Callback", "host_class", "host_classes", "is_host", "loaded_hosts"]

if TYPE_CHECKING:
    from lightning.pytorch import Callback

_FABRIC = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}
_SECTIONS = ("", ".callbacks", ".strategies", ".loggers", ".core.optimizer", ".plugins")


def loaded_hosts() -> tuple[str, ...]:
    """Return the hosts that this process has imported, ``lightning.pytorch`` first.

    >>> "lightning.pytorch" in loaded_hosts()
    True
    """
    return tuple([root for root in _FABRIC if root in sys.modules])


def is_host(obj: object, name: str) -> bool:
    """Check whether ``obj`` is an instance of the class ``name`` of any loaded host.

    Args:
        obj: anything.
        name: a class name (``"ModelCheckpoint"``), or its path below a host (``"callbacks.ModelCheckpoint"``).

    Raises:
        ValueError: no loaded host has such a class.

    Example:
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> is_host(ModelCheckpoint(), "ModelCheckpoint"), is_host("model.ckpt", "ModelCheckpoint")
        (True, False)
    """
    return isinstance(obj, host_classes(name))


def host_classes(name: str) -> tuple[type, ...]:
    """Return the classes ``name`` of all loaded hosts.

    Args:
        name: as for `is_host`.

    Raises:
        ValueError: no loaded host has such a class.
    """
    return _classes(loaded_hosts(), name)


def host_class(near: object, name: str) -> type:
    """Return the class ``name`` of the host that ``near`` belongs to.

    Args:
        near: a Trainer, LightningModule, callback or strategy, of the user or of Lightning.
        name: a class name, or its path below the host; with the prefix ``"fabric."`` of that host's Fabric.

    Raises:
        ValueError: ``near`` belongs to no host, or its host has no such class.

    Example:
        >>> from lightning.pytorch.callbacks import EarlyStopping, Timer
        >>> host_class(Timer(), "callbacks.EarlyStopping") is EarlyStopping
        True
    """
    root = _host_of(near)
    found = _find(root, name) if root else None
    if found is None:
        raise ValueError(
            f"`host_class({type(near).__name__}, {name!r})`: expected an object of Lightning and a class of its host, "
            f"found {f'no {name!r} in {root}' if root else 'an object of neither host'}. "
            "Give a Trainer, a LightningModule or a callback, and a path such as 'callbacks.ModelCheckpoint'."
        )
    return found


def _host_of(near: object) -> str | None:
    for cls in type(near).__mro__:
        for root in loaded_hosts():
            if cls.__module__ == root or cls.__module__.startswith(root + "."):
                return root
    return None


@functools.cache  # called in every step
def _classes(roots: tuple[str, ...], name: str) -> tuple[type, ...]:
    classes = tuple([found for root in roots if (found := _find(root, name)) is not None])
    if not classes:
        raise ValueError(
            f"`is_host(..., {name!r})`: expected a class of Lightning, found none in {' or '.join(roots)}. "
            "Give its path, for instance 'callbacks.ModelCheckpoint'."
        )
    return classes


@functools.cache
def _find(root: str, name: str) -> type | None:
    folder, _, last = name.removeprefix("pytorch.").rpartition(".")
    if folder == "fabric" or folder.startswith("fabric."):
        places = [_FABRIC[root] + folder.removeprefix("fabric")]
    else:
        places = [f"{root}.{folder}"] if folder else [root + section for section in _SECTIONS]
    for place in places:
        found = getattr(_module(place), last, None)
        if isinstance(found, type):
            return found
    return None


def _module(name: str) -> object:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            return None  # a path that this host does not have, not a broken installation
        raise


def _callback_class() -> type:
    """Return a subclass of the Callback of every loaded host; loads `lightning.pytorch` if it is installed."""
    for root in _FABRIC:
        installed = root in sys.modules or importlib.util.find_spec(root.partition(".")[0]) is not None
        if installed and not (root == "pytorch_lightning" and loaded_hosts()):
            importlib.import_module(root)
    bases = tuple(sys.modules[root].Callback for root in loaded_hosts())
    return type("Callback", bases, {"__doc__": "A callback of every host that is loaded.", "__module__": __name__})


if not TYPE_CHECKING:
    Callback = _callback_class()
