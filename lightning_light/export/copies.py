"""Copy a module for export, so that the live one is not changed."""

from __future__ import annotations

import sys
from typing import TypeVar

from torch import nn

from lightning_light.copies import copy_network
from lightning_light.example_input import ExampleInput
from lightning_light.int8 import quantizers_of
from lightning_light.isolation import uncompile
from lightning_light.merging import TOLERANCE, check_merged, merge_blocks, merging_method

__all__ = ["detached", "detached_copy", "merged", "merged_copy"]

M = TypeVar("M", bound=nn.Module)


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
    return detached(copy_network(model))


def detached(model: M) -> M:
    """Return ``model`` as `detached_copy` does, in place."""
    return _uncompiled(model).cpu().eval().requires_grad_(False)


def merged(model: nn.Module) -> dict[str, str] | None:
    """Merge branches in place, without a comparison; None where there are none, or the network is quantized."""
    quantized = any(quantizer.enabled for quantizer in quantizers_of(model))
    if quantized or not any(map(merging_method, model.modules())):
        return None
    found = merge_blocks(model)
    model.requires_grad_(False)
    return found


def merged_copy(model: M, example: ExampleInput) -> tuple[M, dict[str, str]]:
    """Copy ``model`` as `detached_copy` does, and merge the branches of its blocks; of a quantized network none.

    Returns:
        The copy, and the name of each merged block with the method that merged it.

    Raises:
        ParityError: the outputs on ``example`` are no longer the same.
    """
    copied = detached_copy(model)
    found = merged(copied)
    if found is not None:
        mend = "Or export it as it is, with `merge_branches=False`."
        check_merged(f"export of {type(model).__name__}", detached_copy(model), copied, example, TOLERANCE, mend=mend)
    return copied, found or {}


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
