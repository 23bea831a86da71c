"""Copy a module for export, so that the live one is not changed."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_light.example_input import ExampleInput
from lightning_light.int8 import quantizers_of
from lightning_light.isolation import uncompile
from lightning_light.merging import TOLERANCE, check_merged, merge_blocks, merging_method

__all__ = ["detached_copy", "merged_copy"]

M = TypeVar("M", bound=nn.Module)

_HOSTS = ("lightning", "pytorch_lightning")
_NOT_OF_THE_NETWORK = (
    torch.Generator,
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
    Dataset,
    DataLoader,
)


def detached_copy(model: M) -> M:
    """Copy ``model`` on the CPU, in evaluation mode, without gradients and without ``torch.compile``.

    The network is copied, with the hooks that are part of its forward pass. Objects that it only refers to (Trainer,
    loggers, datasets, optimizers, the owners of hooks, and attributes that cannot be copied) are shared.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
        >>> copied = detached_copy(model)
        >>> copied.training, copied[0].weight is model[0].weight, model.training
        (False, False, True)
    """
    memo: dict[int, Any] = {id(quantizer): quantizer for quantizer in quantizers_of(model)}
    for module in model.modules():
        for name, value in vars(module).items():
            _share(value, memo, hooks=name.endswith("_hooks"))
    copied = _uncompiled(_deepcopy(model, memo))
    return copied.cpu().eval().requires_grad_(False)


def merged_copy(model: M, example: ExampleInput) -> tuple[M, dict[str, str]]:
    """Copy ``model`` as `detached_copy` does, and merge the branches of its blocks; of a quantized network none.

    Returns:
        The copy, and the name of each merged block with the method that merged it.

    Raises:
        ParityError: the outputs on ``example`` are no longer the same.
    """
    copied = detached_copy(model)
    quantized = any(quantizer.enabled for quantizer in quantizers_of(copied))
    if quantized or not any(map(merging_method, copied.modules())):
        return copied, {}
    merged = merge_blocks(copied)
    copied.requires_grad_(False)
    mend = "Or export it as it is, with `merge_branches=False`."
    check_merged(f"export of {type(model).__name__}", detached_copy(model), copied, example, TOLERANCE, mend=mend)
    return copied, merged


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


def _uncompiled(model: M) -> M:
    """Make every compiled module run as written: compiled code cannot be traced."""
    uncompile(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            module._modules[name] = _original(child)
    return _original(model)


def _original(module: M) -> M:
    dynamo = sys.modules.get("torch._dynamo")  # loaded if anything was compiled
    compiled = dynamo is not None and isinstance(module, dynamo.OptimizedModule)
    return module._orig_mod if compiled else module  # type: ignore[return-value]
