"""Run a model to look at it, and leave no trace: modes, buffers, attributes, hooks and randomness are as before."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["unfused_kernels", "uncompiled", "isolated"]

_TABLES = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_COMPILED = ("_compiled_call_impl", "forward")


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, inside which a forward pass changes nothing that outlives it.

    Forward hooks are silent (but for those of ``torch.nn.utils`` that make a weight), compiled modules run uncompiled,
    and buffers are copies. Afterwards every module has
    the attributes, training mode, hooks and buffers it had, and the generators of Python and torch (CPU and every
    device of the model) go on where they were. What a module changes inside its own lists and dicts stays changed.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)).train()
        >>> with isolated(model):
        ...     (model.training, torch.is_grad_enabled())
        (False, False)
        >>> model.training
        True
    """
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    before = [(vars(module), dict(vars(module)), _contents(module)) for module in modules]
    python_state = random.getstate()
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.random.fork_rng(devices=_cuda_devices(model)))
            stack.enter_context(uncompiled(model))
            _silence_hooks(modules)
            yield
    finally:
        random.setstate(python_state)
        for live, attributes, contents in before:
            live.clear()
            live.update(attributes)
            for table, entries in contents.items():
                live[table].clear()
                live[table].update(entries)


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Inside, modules that ``torch.compile`` has a hand in run as written, those compiled in place and wrapped ones."""
    tables = [(module, vars(module)) for module in model.modules()]
    before = [(table, {key: table[key] for key in _COMPILED if key in table}) for _, table in tables]
    try:
        for module, table in tables:
            if "_compiled_call_impl" in table:
                table["_compiled_call_impl"] = None
            if "forward" in table and "_orig_mod" in module._modules:
                table["forward"] = module._modules["_orig_mod"]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using `torch.compile.module.` when there are global hooks")
            yield
    finally:
        for table, entries in before:
            table.update(entries)


@contextmanager
def unfused_kernels(*, convolutions: bool = False) -> Iterator[None]:
    """No fused kernel for attention or recurrent layers: it would hide the products inside it.

    Args:
        convolutions: keep the fast libraries, which recurrent layers use as well; for networks that have none.
    """
    mha, mkldnn, cudnn = torch.backends.mha, torch.backends.mkldnn, torch.backends.cudnn
    before = mha.get_fastpath_enabled(), mkldnn.enabled, cudnn.enabled
    try:
        mha.set_fastpath_enabled(False)
        if not convolutions:
            mkldnn.enabled = cudnn.enabled = False  # type: ignore[assignment]  # typed as the descriptor it is
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        mha.set_fastpath_enabled(before[0])
        mkldnn.enabled, cudnn.enabled = before[1:]


def _contents(module: nn.Module) -> dict[str, dict[str, Any]]:
    return {table: dict(vars(module)[table]) for table in _TABLES}


def _silence_hooks(modules: list[nn.Module]) -> None:
    copies: dict[Tensor, Tensor] = {}  # one copy for a buffer that several modules share
    for module in modules:
        attributes = vars(module)
        attributes["training"] = False
        for hooks in _HOOKS:
            attributes[hooks] = type(attributes[hooks])(_of_torch(attributes[hooks]))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = copies.setdefault(buffer, buffer.clone())


def _of_torch(hooks: dict[int, Any]) -> list[tuple[int, Any]]:
    """Hooks that make a layer's weight (``torch.nn.utils.weight_norm`` and its like) are part of the layer."""
    return [(key, hook) for key, hook in hooks.items() if type(hook).__module__.startswith("torch.nn.utils.")]


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    tensors = (*model.parameters(), *model.buffers())
    return sorted({tensor.device for tensor in tensors if tensor.device.type == "cuda"}, key=str)
