"""Operator calls of a forward pass: their identity, their arguments, and a way to intercept them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_light.quantization.tracer_warnings import attributed_to_caller

__all__ = ["ModuleCallStack", "OpCall", "OpId", "OpMode"]

_PRIVATE = "_lightning_light"


class OpId(NamedTuple):
    """Identity of an operator call within a forward pass, the same in every run.

    Attributes:
        module: path of the module that calls the operator.
        call: which call of that module, from 1 on.
        function: name of the torch function.
        occurrence: which call of that function in this call of the module, from 1 on.
    """

    module: str
    call: int
    function: str
    occurrence: int


@dataclass
class OpCall:
    """One operator call.

    Attributes:
        id: its identity.
        function: the torch function.
        args: positional arguments.
        kwargs: keyword arguments.
        result: what the function returned, once it has been called.
    """

    id: OpId
    function: Callable[..., Any]
    args: list[Any]
    kwargs: dict[str, Any]
    result: Any = None

    @property
    def input(self) -> Any:
        """The first argument."""
        return self.args[0] if self.args else self.kwargs.get("input")

    @property
    def values(self) -> list[Any]:
        """All arguments in order; an argument's position is its place in this list."""
        return [*self.args, *self.kwargs.values()]

    def replace(self, position: int, value: Any) -> None:
        """Replace the argument at ``position``."""
        if position < len(self.args):
            self.args[position] = value
        else:
            self.kwargs[list(self.kwargs)[position - len(self.args)]] = value

    def get(self, name: str, position: int, default: Any = None) -> Any:
        """The argument ``name``, however it was passed."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def set(self, name: str, position: int, value: Any) -> None:
        """Set the argument ``name``, however it was passed."""
        if len(self.args) > position:
            self.args[position] = value
        else:
            self.kwargs[name] = value

    def run(self) -> Any:
        """Call the function."""
        return self.function(*self.args, **self.kwargs)


class OpMode(TorchFunctionMode):
    """Route every operator call inside a model to ``handle``, which returns its result."""

    def __init__(self, stack: ModuleCallStack, handle: Callable[[OpCall], Any]) -> None:
        super().__init__()
        self._stack, self._handle = stack, handle

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op = self._stack.next_op(str(getattr(func, "__name__", func)))
        if op is None:
            return func(*args, **(kwargs or {}))
        call = OpCall(op, func, list(args), dict(kwargs or {}))
        if torch._C._get_tracing_state() is None:
            return self._handle(call)
        with attributed_to_caller():
            return self._handle(call)


class ModuleCallStack:
    """The modules that are being called, innermost last; kept by hooks on all of them.

    Names agree between runs, also where a part of the network is called by itself. A subclass may act where the
    outermost call begins and ends.
    """

    def __init__(self) -> None:
        self._stack: list[tuple[str, int, Counter[str]] | None] = []
        self._calls: Counter[str] = Counter()
        self._handles: list[RemovableHandle] = []

    def attach(self, model: nn.Module) -> None:
        """Hook every module of ``model``."""
        for name, module in model.named_modules():
            if not name.startswith(_PRIVATE):
                hooks = _Hooks(self, name)
                before = module.register_forward_pre_hook(hooks.enter, prepend=True, with_kwargs=True)
                self._handles += [before, module.register_forward_hook(hooks.leave, always_call=True)]

    def detach(self) -> None:
        """Remove the hooks; more than once does no harm."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.reset()

    def reset(self) -> None:
        """End a call that an error has left: `torch.export` runs no hook then, not even those that always run."""
        if self.is_running:
            self.end()
        self._stack = []

    @property
    def is_running(self) -> bool:
        """Whether a module is being called."""
        return any(frame is not None for frame in self._stack)

    def next_op(self, function: str) -> OpId | None:
        """Identity of the operator call that is about to run; None outside of the model."""
        frame = self._stack[-1] if self._stack else None
        if frame is None:
            return None
        name, call, counts = frame
        counts[function] += 1
        return OpId(name, call, function, counts[function])

    def begin(self) -> None:
        """Act before the outermost call."""

    def end(self) -> None:
        """Act after the outermost call, failed or not."""

    def output(self, output: Any) -> Any:
        """Replace the output of the outermost call; None leaves it."""

    def push(self, name: str, module: nn.Module) -> None:
        """Enter a module."""
        if getattr(vars(module).get("forward"), "__qualname__", "").startswith("_ForwardRedirection"):
            self._stack.append(None)  # DDP calls `training_step` through `forward`: no call of the network's
            return
        if not self.is_running:
            self._calls.clear()
            self.begin()
        self._calls[name] += 1
        self._stack.append((name, self._calls[name], Counter()))

    def pop(self) -> bool:
        """Leave a module; whether its call was the outermost one."""
        if self._stack and self._stack.pop() is not None and not self.is_running:
            self.end()
            return True
        return False


class _Hooks:
    """The hooks of one module: bound methods, which copies and pickles can follow."""

    def __init__(self, stack: ModuleCallStack, name: str) -> None:
        self.stack, self.name = stack, name

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.stack.push(self.name, module)

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self.stack.output(output) if self.stack.pop() else None
