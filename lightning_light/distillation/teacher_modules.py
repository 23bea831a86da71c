"""Run a teacher during a fit: without gradients, in evaluation mode, on the student's device and precision."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_light.distillation.feature_layers import module_at
from lightning_light.distillation.student_hook import ForwardCall, StudentHook
from lightning_light.example_input import ExampleInput

__all__ = ["InModelTeacher", "SeparateTeacher", "TeacherModule"]


class TeacherModule(ABC):
    """A teacher during one fit.

    Attributes:
        root: the module in which feature layers are looked up.
        prefix: of its tensor names in the LightningModule, if its shapes change along with the student's; else None.
    """

    in_training_step: ClassVar[bool]
    """Whether its forward pass is part of the user's ``training_step``."""

    root: nn.Module
    prefix: str | None

    @abstractmethod
    def output(self, call: ForwardCall, inputs: ExampleInput) -> Any:
        """Return the teacher's output for the current batch.

        Args:
            call: of the student.
            inputs: of the teacher.
        """

    def register(self, pl_module: nn.Module) -> None:  # noqa: B027  # a separate teacher needs no hooks
        """Hook the modules as they are now; called again when the student's structure has changed."""

    def record(self, enabled: bool) -> None:  # noqa: B027  # as above
        """Start or stop recording calls within ``training_step``."""

    @abstractmethod
    def release(self) -> None:
        """Remove hooks and restore the state that the teacher came in."""

    @property
    def has_submodules(self) -> bool:
        """Whether its inner modules can be hooked."""
        return True


class SeparateTeacher(TeacherModule):
    """A network of its own, called by the callback; used as it is where device and precision fit, else as a copy.

    Args:
        module: the teacher.
        like: a parameter of the student, whose device and floating type it takes.
        prefix: see `TeacherModule`.
    """

    in_training_step = False

    def __init__(self, module: nn.Module, like: Tensor, prefix: str | None = None) -> None:
        self.prefix = prefix
        tensors = [*module.parameters(), *module.buffers()]
        if any(t.device != like.device or (t.is_floating_point() and t.dtype != like.dtype) for t in tensors):
            module = _moved(module, like)
        self.module = self.root = module
        self._modes = {part: part.training for part in module.modules()}
        self._is_checked = False
        if not isinstance(module, torch.fx.GraphModule):  # an exported program has no modes
            module.eval()

    @property
    @override
    def has_submodules(self) -> bool:
        return not isinstance(self.module, torch.jit.ScriptModule | torch.fx.GraphModule)

    @override
    def output(self, call: ForwardCall, inputs: ExampleInput) -> Any:
        """Call the teacher without gradients.

        Raises:
            ValueError: at the first call, if its signature or the shapes of its inputs do not fit.
        """
        args, kwargs = inputs.args, inputs.kwargs
        with torch.no_grad():
            if self._is_checked:
                return self.module(*args, **kwargs)
            self._check_signature(args, kwargs)
            try:
                output = self.module(*args, **kwargs)
            except (RuntimeError, TypeError) as error:
                raise ValueError(f"{self._refusal(args, kwargs)} It raised: {error}") from error
            self._is_checked = True
            return output

    def use_part(self, path: str) -> None:
        """Call only the teacher's part at ``path`` from now on, as only this part of the student is called."""
        self.module = self.root.get_submodule(path)

    def shared_parameters(self, optimizers: Iterable[Any]) -> int:
        """Count the teacher's parameters that an optimizer changes."""
        trained = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        return sum(id(parameter) in trained for parameter in self.root.parameters())

    @override
    def release(self) -> None:
        for part, mode in self._modes.items():
            part.training = mode

    def _check_signature(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.has_submodules:
            return
        try:
            inspect.signature(self.module.forward).bind(*args, **kwargs)
        except TypeError as error:
            raise ValueError(f"{self._refusal(args, kwargs)} Its signature: {error}.") from error

    def _refusal(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        given = ", ".join([*map(_describe, args), *(f"{name}={_describe(value)}" for name, value in kwargs.items())])
        return (
            f"`KnowledgeDistillation({type(self.module).__name__}(...))`: expected a teacher that takes the inputs of "
            f"the student's forward, found one that does not take ({given}). Select its inputs: "
            "`batch=BatchFields(inputs=lambda batch: ...)`."
        )


class InModelTeacher(TeacherModule):
    """A part of the LightningModule as teacher: its output in ``training_step`` is recorded.

    Args:
        path: of the part; None for the student itself.
        pl_module: the LightningModule.
        student: path of the student; empty for the LightningModule.
    """

    in_training_step = True

    def __init__(self, path: str | None, pl_module: nn.Module, student: str) -> None:
        self._path = student if path is None else path
        self._hook = None if path is None else StudentHook(path)
        self.prefix = f"{self._path}." if self._path else ""
        self.register(pl_module)

    @override
    def register(self, pl_module: nn.Module) -> None:
        self.root = module_at(pl_module, self._path, f"OnlineTeacher({self._path!r})")
        if self._hook is not None:
            self._hook.register(pl_module)

    @override
    def record(self, enabled: bool) -> None:
        if self._hook is not None:
            self._hook.enabled = enabled
            if enabled:
                self._hook.calls.clear()

    @override
    def output(self, call: ForwardCall, inputs: ExampleInput) -> Any:
        """Return the recorded output.

        Raises:
            ValueError: ``training_step`` has not called the part.
        """
        recorded = call if self._hook is None else self._hook.pop()
        if recorded is None:
            raise ValueError(
                f"`OnlineTeacher({self._path!r})`: expected `training_step` to call `{self._path}`, with gradients on, "
                "before the student's loss is known, found that it does not. Name a module that it calls."
            )
        return recorded.output

    @override
    def release(self) -> None:
        if self._hook is not None:
            self._hook.remove()


def _moved(module: nn.Module, like: Tensor) -> nn.Module:
    if isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule):
        return module.to(like.device)  # its precision is part of its code
    return copy.deepcopy(module).to(like.device, like.dtype)


def _describe(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
