"""Copy a network without the objects of a run that it refers to."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_light.int8 import quantizers_of

__all__ = ["copy_network"]

_HOSTS = ("lightning", "pytorch_lightning")
_NOT_OF_THE_NETWORK = (
    torch.Generator,
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
    Dataset,
    DataLoader,
)


M = TypeVar("M", bound=nn.Module)


def copy_network(model: M) -> M:
    """Copy ``model`` with the hooks that are part of its forward pass.

    Objects that it only refers to (Trainer, loggers, datasets, optimizers, the owners of hooks, and attributes that
    cannot be copied) are shared.

    Example:
        >>> import threading
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> model.lock = threading.Lock()
        >>> copied = copy_network(model)
        >>> copied[0].weight is model[0].weight, copied.lock is model.lock
        (False, True)
    """
    memo: dict[int, Any] = {id(quantizer): quantizer for quantizer in quantizers_of(model)}
    for module in model.modules():
        for name, value in vars(module).items():
            _share(value, memo, hooks=name.endswith("_hooks"))
    return _deepcopy(model, memo)


def _deepcopy(model: M, memo: dict[int, Any]) -> M:
    try:
        return copy.deepcopy(model, dict(memo))
    except (TypeError, RuntimeError):  # an attribute that cannot be copied: a lock, a file, a connection
        memo |= {id(value): value for value in _uncopyable(model, memo)}
        return copy.deepcopy(model, memo)


def _uncopyable(model: nn.Module, memo: dict[int, Any]) -> Iterator[object]:
    for module in model.modules():
        for name, value in vars(module).items():
            if name in {"_parameters", "_buffers", "_modules"} or isinstance(value, Tensor | nn.Module):
                continue
            try:
                copy.deepcopy(value, dict(memo))
            except (TypeError, RuntimeError):
                yield value


def _share(value: object, memo: dict[int, Any], *, hooks: bool) -> None:
    """Add to deepcopy's memo what is not to be copied."""
    if isinstance(value, Tensor):
        if not value.is_leaf:  # deepcopy refuses it: a loss kept for later, a weight made by a hook
            memo[id(value)] = value.detach().clone()
    elif isinstance(value, Mapping):
        for item in value.values():
            _share(item, memo, hooks=hooks)
    elif isinstance(value, list | tuple):
        for item in value:
            _share(item, memo, hooks=hooks)
    elif isinstance(value, MethodType):
        if hooks and not isinstance(value.__self__, nn.Module):
            memo[id(value.__self__)] = value.__self__
    elif isinstance(value, _NOT_OF_THE_NETWORK) or _is_of_host(value):
        memo[id(value)] = value


def _is_of_host(value: object) -> bool:
    """A Trainer, logger, callback or data module; a LightningModule inside another is part of the network."""
    return not isinstance(value, nn.Module) and any(
        base.__module__.partition(".")[0] in _HOSTS for base in type(value).__mro__
    )
