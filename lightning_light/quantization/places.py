"""Names for the operations of a forward pass: which module, which of its calls, which operation in it.

``features.conv1|1|conv2d|1`` is the first ``conv2d`` in the first call of ``features.conv1``. The names of a run and
of the recording that a plan was made from agree, also where a part of the network is called by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["Frames", "module_of"]

_PRIVATE = "_lightning_light"


def module_of(key: str) -> str:
    """The path of the module that an operation belongs to."""
    return key.partition("|")[0]


class Frames:
    """The modules that are being called, innermost last; kept by hooks on all of them.

    A subclass says what happens when the outermost call begins and ends.

    Attributes:
        outermost: name and module of that call: of a copy, if that is called.
    """

    def __init__(self) -> None:
        self.outermost: tuple[str, nn.Module] | None = None
        self._stack: list[tuple[str, int, Counter[str]] | None] = []
        self._calls: Counter[str] = Counter()
        self._handles: list[RemovableHandle] = []

    def watch(self, model: nn.Module) -> None:
        """Hook every module of ``model``."""
        for name, module in _modules(model):
            place = _Place(self, name)
            before = module.register_forward_pre_hook(place.enter, prepend=True, with_kwargs=True)
            self._handles += [before, module.register_forward_hook(place.leave, always_call=True)]

    def let_go(self) -> None:
        """Remove the hooks; more than once does no harm."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.abandon()

    def abandon(self) -> None:
        """End a call that an error has left: `torch.export` runs no hook then, not even those that are always run."""
        if self.inside:
            self.end()
        self._stack, self.outermost = [], None

    @property
    def inside(self) -> bool:
        """Whether a module is being called."""
        return any(frame is not None for frame in self._stack)

    def next_key(self, operation: str) -> str | None:
        """The name of the operation that is about to run."""
        frame = self._stack[-1] if self._stack else None
        if frame is None:
            return None
        name, call, counts = frame
        counts[operation] += 1
        return f"{name}|{call}|{operation}|{counts[operation]}"

    def begin(self) -> None:
        """The outermost call begins."""

    def end(self) -> None:
        """The outermost call has ended, well or not."""

    def finish(self, output: Any) -> Any:
        """What the outermost call gives instead of ``output``; None for itself."""

    def _push(self, name: str, module: nn.Module) -> None:
        if _is_redirected(module):  # DDP calls `training_step` through `forward`: no call of the network's
            self._stack.append(None)
            return
        if not self.inside:
            self._calls.clear()
            self.outermost = name, module
            self.begin()
        self._calls[name] += 1
        self._stack.append((name, self._calls[name], Counter()))

    def _pop(self) -> bool:
        """Whether this was the outermost call."""
        if self._stack and self._stack.pop() is not None and not self.inside:
            self.end()
            self.outermost = None
            return True
        return False


class _Place:
    """The hooks of one module: bound methods, which copies and pickles can follow."""

    def __init__(self, frames: Frames, name: str) -> None:
        self.frames, self.name = frames, name

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.frames._push(self.name, module)

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self.frames.finish(output) if self.frames._pop() else None


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if not name.startswith(_PRIVATE):
            yield name, module


def _is_redirected(module: nn.Module) -> bool:
    return getattr(vars(module).get("forward"), "__qualname__", "").startswith("_ForwardRedirection")
