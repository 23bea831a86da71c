"""Record the student's forward calls during ``training_step``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_light.host.patches import RunHook

__all__ = ["ForwardCall", "StudentHook"]


@dataclass(frozen=True, eq=False)
class ForwardCall:
    """Inputs and output of one forward call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class StudentHook:
    """Forward hook that keeps the latest call of the student, while it is enabled.

    Args:
        path: see Attributes.
        gradients: whether calls count that run with gradients, or those without.

    Attributes:
        enabled: whether calls are kept.
        path: of the student in the LightningModule; None until it is known whether ``training_step`` calls the
            LightningModule itself or one part of it.
        calls: path -> latest call, of the candidates that were called.
    """

    def __init__(self, path: str | None, *, gradients: bool = True) -> None:
        self.enabled = False
        self._gradients = gradients
        self.path = path
        self.calls: dict[str, ForwardCall] = {}
        self._hooks = ExitStack()

    def register(self, pl_module: nn.Module) -> None:
        """Hook the student; if its path is not known yet, the LightningModule and its children."""
        self.remove()
        if self.path is not None:
            candidates = {self.path: pl_module.get_submodule(self.path)}
        else:
            children = dict(pl_module.named_children())
            candidates = {"": pl_module} | {name: child for name, child in children.items() if [*child.parameters()]}
        for name, module in candidates.items():
            self._hooks.enter_context(module.register_forward_hook(RunHook(self._hook(name)), with_kwargs=True))

    def pop(self) -> ForwardCall | None:
        """Return the student's call and forget all calls, so that their graphs can be freed.

        Raises:
            ValueError: several parts were called, and the student's path is not known.
        """
        calls = dict(self.calls)
        self.calls.clear()
        if self.path is None and "" in calls:
            self.path = ""
        elif self.path is None and len(calls) == 1:
            (self.path,) = calls
        elif self.path is None and calls:
            raise ValueError(
                f"`KnowledgeDistillation(student=None)`: expected `training_step` to call the LightningModule or one "
                f"part of it, found calls of {', '.join(map(repr, calls))}. Name one: `student='...'`."
            )
        return None if self.path is None else calls.get(self.path)

    def remove(self) -> None:
        """Remove the hooks and forget the calls."""
        self._hooks.close()
        self.calls.clear()

    def _hook(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self.enabled and torch.is_grad_enabled() == self._gradients:
                self.calls[name] = ForwardCall(args, kwargs, output)

        return keep
