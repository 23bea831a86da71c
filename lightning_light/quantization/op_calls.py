"""Operator calls of a forward pass: their identity, their arguments, and a way to intercept them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_light.module_stack import ModuleCall, ModuleStack
from lightning_light.nested import are_sizes
from lightning_light.validation import PositiveInt

__all__ = ["OpCall", "OpId", "OpStack"]


class OpId(NamedTuple):
    """Identity of an operator call within a forward pass, the same in every run.

    Attributes:
        module: path of the module that calls the operator.
        call: which call of that module, from 1 on.
        function: name of the torch function.
        occurrence: which call of that function in this call of the module, from 1 on.
    """

    module: str
    call: PositiveInt
    function: str
    occurrence: PositiveInt


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


class OpStack(ModuleStack, TorchFunctionMode):
    """Routes every operator call inside a model to ``handle``, which returns its result.

    Identities agree between runs, also where a part of the network is called by itself. A subclass may act where the
    outermost call begins, and replace its output.
    """

    def __init__(self, handle: Callable[[OpCall], Any]) -> None:
        ModuleStack.__init__(self)
        TorchFunctionMode.__init__(self)
        self._handle = handle
        self._counts: Counter[tuple[str, int, str]] = Counter()
        self._modes = ExitStack()

    def begin(self, args: tuple[Any, ...]) -> None:
        """Act before the outermost call."""
        self._modes.enter_context(self)
        if "torch._dynamo" in sys.modules:  # compiled code would not see the mode
            self._modes.enter_context(torch.compiler.set_stance("force_eager"))

    def output(self, output: Any) -> Any:
        """Replace the output of the outermost call; None leaves it."""

    @override
    def entered(self, call: ModuleCall) -> None:
        if self.outermost is call:
            self._counts.clear()
            self.begin(call.args)

    @override
    def left(self, call: ModuleCall, output: Any) -> Any:
        if self.outermost is not None:
            return None
        self._modes.close()
        return self.output(output)

    @override
    def reset(self) -> None:
        self._modes.close()
        super().reset()

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return the result of a function that is called; outside of the model it is not handled."""
        kwargs, caller = kwargs or {}, self.current
        if caller is None or are_sizes(args):  # numbers in every run but a traced one
            return func(*args, **kwargs)
        key = (caller.name, caller.number, str(getattr(func, "__name__", func)))
        self._counts[key] += 1
        return self._handle(OpCall(OpId(*key, self._counts[key]), func, list(args), dict(kwargs)))
