"""Run a model without leaving a trace: modes, buffers, attributes, hooks, and random states are restored."""

from __future__ import annotations

import dis
import functools
import inspect
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_light.host.modules import compiled_methods
from lightning_light.host.patches import InstancePatch
from lightning_light.warning_filters import ignored_warnings

if TYPE_CHECKING:
    from lightning_light.example_input import ExampleInput

__all__ = [
    "FORWARD_ERRORS",
    "has_hooks",
    "isolated",
    "observe",
    "plain_attention",
    "plain_execution",
    "uncompile",
    "uncompiled",
    "unfused_kernels",
]

FORWARD_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Errors of a forward pass on what it was not written for."""

_CONTAINERS = (dict, list, set, deque)
_RETURN_NONE = frozenset({"append", "extend", "update", "__setitem__"})
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_LIBRARIES = ("torch.nn.utils.", "transformers.")


@contextmanager
def isolated(model: nn.Module, *, hooks: bool = False) -> Iterator[None]:
    """Run ``model`` in evaluation mode, so that no forward pass inside changes anything that outlives it.

    Inside, gradients, autocast and inference mode are off, compiled modules run uncompiled, and buffers are copies.
    Afterwards every module has the attributes, training mode, hooks and buffers it had, and the random generators
    (Python, NumPy, torch on the CPU and every device of the model) are restored. So are the items of the lists, dicts
    and sets that modules hold: what a forward pass caches there is computed again in the next. What is nested deeper
    stays changed.

    Args:
        model: any module; of ``torch.jit`` modules the training mode alone is changed and restored.
        hooks: run all forward hooks of the user. Otherwise only hooks run that may be part of the forward pass: of
            ``torch.nn.utils``, which compute a weight, of ``transformers``, which collect what a model returns, and
            those that can return another input or output. Other functions that return None in every case only observe.
            Hooks of this package never run, if they were there before.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)).train()
        >>> with isolated(model):
        ...     (model.training, torch.is_grad_enabled())
        (False, False)
        >>> model.training
        True
    """
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    scripted: list[Any] = [part for part in model.modules() if isinstance(part, torch.jit.ScriptModule)]
    modes = [(part, part.training) for part in scripted if hasattr(part, "training")]  # a frozen one has no mode
    before = [(module, type(module), dict(vars(module)), _items(module)) for module in modules]
    try:
        with plain_execution(_cuda_devices(model)), uncompiled(model):
            _copy_buffers(modules)
            for module in modules:
                vars(module)["training"] = False
                _silence_hooks(module, users=hooks)
            for part, _ in modes:
                part.training = False
            yield
    finally:
        for part, mode in modes:
            part.training = mode
        for module, kind, attributes, items in before:
            if type(module) is not kind:  # a lazy layer has become another
                module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            for container, held in items:
                container.clear()
                getattr(container, "update" if isinstance(container, dict | set) else "extend")(held)


def observe(
    model: nn.Module, modules: Mapping[str, nn.Module], calls: Iterable[ExampleInput], act: Callable[..., None]
) -> None:
    """Run calls of ``model`` in isolation; ``act(name, module, args, kwargs, output)`` follows those of ``modules``."""
    with isolated(model), ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context(module.register_forward_hook(functools.partial(act, name), with_kwargs=True))
        for call in calls:
            model(*call.args, **call.kwargs)


def has_hooks(module: nn.Module) -> bool:
    """Check whether ``module`` has forward hooks of the user, or some that compute a weight."""
    return any(_is_kept(hook, users=True) for table in _HOOKS for hook in vars(module)[table].values())


@contextmanager
def plain_execution(devices: list[torch.device] | None = None) -> Iterator[None]:
    """Switch off gradients, autocast and inference mode, and restore the random generators afterwards.

    Args:
        devices: CUDA devices whose generators are restored, besides those of Python, NumPy, and torch on the CPU.
    """
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=devices or []))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            for device in ("cpu", "cuda") if devices else ("cpu",):
                stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        random.setstate(states[0])
        if numpy:
            numpy.random.set_state(states[1])


def uncompile(model: nn.Module) -> list[InstancePatch]:
    """Make compiled modules run as they are written, until the returned patches are undone.

    Covers modules compiled in place, wrapped by ``torch.compile``, and LightningModules that a Trainer was given
    compiled.
    """
    patches = []
    for module in model.modules():
        attributes = vars(module)
        if attributes.get("_compiled_call_impl") is not None:
            patches.append(InstancePatch(module, "_compiled_call_impl", None))
        if "forward" in attributes and "_orig_mod" in module._modules:
            patches.append(InstancePatch(module, "forward", module._modules["_orig_mod"]))
        for name, method in compiled_methods(module).items():
            patches.append(InstancePatch(module, name, method, beneath=True))
    return patches


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run compiled modules as they are written; see `uncompile`."""
    patches = uncompile(model)
    try:
        with ignored_warnings("Using `torch.compile.module.` when there are global hooks"):
            yield
    finally:
        for patch in reversed(patches):
            patch.undo()


@contextmanager
def plain_attention() -> Iterator[None]:
    """Disable the fused fast path of transformer layers, which computes without calling the modules inside."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def unfused_kernels(*, convolutions: bool = False) -> Iterator[None]:
    """Disable fused kernels for attention and recurrent layers, which hide the matrix products inside them.

    Args:
        convolutions: keep oneDNN and cuDNN, which recurrent layers use as well; for networks that have none.
    """
    mkldnn, cudnn = torch.backends.mkldnn, torch.backends.cudnn
    before = mkldnn.enabled, cudnn.enabled
    try:
        if not convolutions:
            mkldnn.enabled = cudnn.enabled = False  # type: ignore[assignment]  # typed as the descriptor it is
        with plain_attention(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        mkldnn.enabled, cudnn.enabled = before


def _items(module: nn.Module) -> list[tuple[Any, Any]]:
    """Return the containers that ``module`` holds, its parameters, buffers and hooks too, and what is in each."""
    containers = [held for held in vars(module).values() if isinstance(held, _CONTAINERS)]
    return [(held, dict(held) if isinstance(held, dict) else list(held)) for held in containers]


def _copy_buffers(modules: list[nn.Module]) -> None:
    copies: dict[Tensor, Tensor] = {}  # one copy for a buffer that several modules share
    for module in modules:
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = copies.setdefault(buffer, buffer.clone())


def _silence_hooks(module: nn.Module, *, users: bool) -> None:
    """Keep the hooks that may be part of the forward pass, or all of the user's."""
    attributes = vars(module)
    for table in _HOOKS:
        hooks = attributes[table]
        attributes[table] = type(hooks)((key, hook) for key, hook in hooks.items() if _is_kept(hook, users=users))


def _is_kept(hook: Any, *, users: bool) -> bool:
    """Check whether a hook is part of a library's models, or is the user's and can return another input or output."""
    function = inspect.unwrap(getattr(hook, "__func__", hook))
    places = type(hook).__module__ or "", getattr(function, "__module__", None) or ""
    if any(place.startswith(_LIBRARIES) for place in places):
        return True
    if (places[1] or places[0]).startswith("lightning_light."):
        return False
    code = getattr(function, "__code__", None)
    return users or code is None or _can_return_value(code)


def _can_return_value(code: types.CodeType) -> bool:
    """Check whether a function can return something other than None; a lambda that adds to a container does not."""
    if code.co_name == "<lambda>" and not _RETURN_NONE.isdisjoint(code.co_names):
        return False
    before = None
    for instruction in dis.get_instructions(code):
        if instruction.opname == "RETURN_CONST" and instruction.argval is not None:
            return True
        if instruction.opname == "RETURN_VALUE":
            from_none = before is not None and before.opname == "LOAD_CONST" and before.argval is None
            if instruction.is_jump_target or not from_none:
                return True
        before = instruction
    return False


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    tensors = (*model.parameters(), *model.buffers())
    return sorted({tensor.device for tensor in tensors if tensor.device.type == "cuda"}, key=str)
