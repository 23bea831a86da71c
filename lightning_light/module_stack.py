"""Follow which modules of a model are being called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_light.host.modules import is_step_call

__all__ = ["ModuleCall", "ModuleStack"]

_PRIVATE_PREFIX = "_lightning_light"


@dataclass(frozen=True, eq=False)
class ModuleCall:
    """One running call of a module.

    Attributes:
        name: path of the module in the model.
        module: the module, of a copy if that is called.
        number: how often the module has been called in the outermost call, this time included.
        args: positional arguments.
    """

    name: str
    module: nn.Module
    number: int
    args: tuple[Any, ...]


class ModuleStack:
    """The calls of a model's modules that are running, innermost last.

    A subclass overrides `entered` and `left` to act when a call begins and ends.

    Attributes:
        calls: the running calls; None for one of ``training_step`` in which DDP calls ``forward`` for it.

    Example:
        >>> model = nn.Sequential(nn.ReLU())
        >>> class Names(ModuleStack):
        ...     def entered(self, call):
        ...         print(repr(call.name), len(self.calls))
        >>> stack = Names()
        >>> stack.watch(model)
        >>> _ = model(torch.zeros(1))
        '' 1
        '0' 2
        >>> stack.remove()
    """

    def __init__(self) -> None:
        self.calls: list[ModuleCall | None] = []
        self._numbers: Counter[str] = Counter()
        self._handles: list[RemovableHandle] = []

    @property
    def current(self) -> ModuleCall | None:
        """The innermost running call; None outside of all calls, and directly in a step."""
        return self.calls[-1] if self.calls else None

    @property
    def outermost(self) -> ModuleCall | None:
        """The outermost running call of the model or a part of it; None outside of all calls."""
        return next((call for call in self.calls if call is not None), None)

    def watch(self, model: nn.Module) -> None:
        """Hook every module of ``model`` until `remove`; a scripted module takes no hooks and counts as its caller."""
        for name, module in model.named_modules():
            if not name.startswith(_PRIVATE_PREFIX) and not isinstance(module, torch.jit.ScriptModule):
                hooks = _Hooks(self, name)
                before = module.register_forward_pre_hook(hooks.enter, prepend=True)
                self._handles += [before, module.register_forward_hook(hooks.leave, always_call=True)]

    def remove(self) -> None:
        """Remove the hooks, and forget running calls. More than once does no harm."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.reset()

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Inside, `watch` a model."""
        self.watch(model)
        try:
            yield
        finally:
            self.remove()

    def reset(self) -> None:
        """Forget calls that an error has ended: `torch.export` then runs no hook, not even with ``always_call``."""
        self.calls = []

    def entered(self, call: ModuleCall) -> None:
        """Act when a call has begun; it is the innermost of `calls`."""

    def left(self, call: ModuleCall, output: Any) -> Any:
        """Act when a call has ended, by an error too; it is no longer in `calls`. Returns another output, or None."""

    def _enter(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if is_step_call(module):
            self.calls.append(None)
            return
        if self.outermost is None:
            self._numbers.clear()
        self._numbers[name] += 1
        self.calls.append(ModuleCall(name, module, self._numbers[name], args))
        self.entered(self.calls[-1])  # type: ignore[arg-type]  # just appended

    def _leave(self, output: Any) -> Any:
        call = self.calls.pop() if self.calls else None
        return None if call is None else self.left(call, output)


class _Hooks:
    """The hooks of one module: bound methods, which copies of the module share."""

    def __init__(self, stack: ModuleStack, name: str) -> None:
        self._stack, self._name = stack, name

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._stack._enter(self._name, module, args)

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self._stack._leave(output)
