"""How distillation gets into a training step that does not know of it, and out again.

``training_step`` is wrapped on the instance, so the term is added inside autocast and before Lightning divides by the
accumulated batches: to the last bit what hand-written code does, also under DDP and with a scaler. In manual
optimization the loss is met in ``manual_backward``, before it is scaled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["Call", "StudentHook", "Wrapping"]


@dataclass(frozen=True, eq=False)
class Call:
    """One call of the student: what it got, and what it said."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class StudentHook:
    """Keeps the latest call of the student that has a graph, while it is switched on.

    Attributes:
        on: whether calls are kept.
        path: of the student inside the LightningModule; None as long as it is not known whether ``training_step``
            calls the LightningModule itself or a part of it.
        called: paths of the candidates that were called.
    """

    def __init__(self, path: str | None) -> None:
        self.on = False
        self.path = path
        self.called: dict[str, Call] = {}
        self._handles: list[RemovableHandle] = []

    def listen(self, pl_module: nn.Module) -> None:
        """Hook the student; if it is not known yet, the LightningModule and its children."""
        self.remove()
        if self.path is not None:
            candidates = {self.path: pl_module.get_submodule(self.path)}
        else:
            children = {
                name: child for name, child in pl_module.named_children() if any(True for _ in child.parameters())
            }
            candidates = {"": pl_module, **children}
        for name, module in candidates.items():
            self._handles.append(module.register_forward_hook(self._hook(name), with_kwargs=True))

    def take(self) -> Call | None:
        """The call that is distilled; afterwards nothing is held, so that its graph can go."""
        called = dict(self.called)
        self.called.clear()
        if self.path is None and "" in called:
            self.path = ""
        elif self.path is None and len(called) == 1:
            (self.path,) = called
        elif self.path is None and called:
            raise ValueError(
                f"`KnowledgeDistillation(student=None)`: expected `training_step` to call the LightningModule or one "
                f"part of it, found calls of {', '.join(map(repr, called))}. Name one: `student='...'`."
            )
        return None if self.path is None else called.get(self.path)

    def remove(self) -> None:
        """Leave no hook behind."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.called.clear()

    def _hook(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self.on and torch.is_grad_enabled():
                self.called[name] = Call(args, kwargs, output)

        return keep


class Wrapping:
    """One method of an instance, wrapped; `undo` also when somebody else has wrapped it since.

    Args:
        owner: the instance.
        name: of the method.
        around: the method, and its arguments -> what is returned in its place.
    """

    def __init__(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        original = getattr(owner, name)
        had = vars(owner).get(name)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs) if self._active else original(*args, **kwargs)

        self._owner, self._name, self._active = owner, name, True
        wrapper._undone = lambda: (not self._active, had)  # type: ignore[attr-defined]
        setattr(owner, name, wrapper)

    def undo(self) -> None:
        """Take the wrapper away, and every one below it that is done too; or leave it, passing through."""
        self._active = False
        current = vars(self._owner).get(self._name)
        while current is not None and hasattr(current, "_undone"):
            done, had = current._undone()
            if not done:
                return
            if had is None:
                vars(self._owner).pop(self._name)
            else:
                vars(self._owner)[self._name] = had
            current = had


def add_to(output: Any, extra: Tensor) -> Any:
    """What ``training_step`` returned, with ``extra`` added to its loss; the user's dict stays as it is."""
    if isinstance(output, Mapping):
        return {**output, "loss": output["loss"] + extra}
    return output + extra
