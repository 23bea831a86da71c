"""Where a teacher comes from, and how it is kept: out of the student, without gradients, in evaluation mode."""

from __future__ import annotations

import copy
import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_light.surgery.checkpoint import load_from_checkpoint

__all__ = [
    "CheckpointTeacher",
    "FactoryTeacher",
    "FileTeacher",
    "LiveTeacher",
    "SelfTeacher",
    "Teacher",
    "TeacherSource",
    "as_source",
]


class TeacherSource(ABC):
    """Something that gives a teacher when a fit begins; a frozen value, so that it can be written in YAML."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The teacher."""


@dataclass(frozen=True)
class CheckpointTeacher(TeacherSource):
    """A LightningModule from its checkpoint, compressed or not.

    Args:
        module: the class, or its import path.
        path: the checkpoint.
        arguments: for ``load_from_checkpoint``: hyper-parameters that the checkpoint does not have.

    Example:
        >>> CheckpointTeacher("project.models.Classifier", "teacher.ckpt")
        CheckpointTeacher(module='project.models.Classifier', path='teacher.ckpt', arguments={})
    """

    module: str | type[Any]
    path: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @override
    def build(self) -> nn.Module:
        cls = _imported(self.module) if isinstance(self.module, str) else self.module
        teacher: nn.Module = load_from_checkpoint(cls, self.path, map_location="cpu", **self.arguments)
        return teacher


@dataclass(frozen=True)
class FactoryTeacher(TeacherSource):
    """Made by a class or function when a fit begins; in YAML its import path.

    Args:
        factory: a class or function, or its import path.
        arguments: what it is called with.

    Example:
        >>> FactoryTeacher("torch.nn.Linear", {"in_features": 3, "out_features": 2}).build()
        Linear(in_features=3, out_features=2, bias=True)
    """

    factory: str | Callable[..., nn.Module]
    arguments: dict[str, Any] = field(default_factory=dict)

    @override
    def build(self) -> nn.Module:
        make = _imported(self.factory) if isinstance(self.factory, str) else self.factory
        built = make(**self.arguments)
        if not isinstance(built, nn.Module):
            raise TypeError(
                f"`KnowledgeDistillation(teacher={self.factory!r})`: expected a function that returns a module, found "
                f"one that returns {type(built).__name__}."
            )
        return built


@dataclass(frozen=True)
class FileTeacher(TeacherSource):
    """A network in a file that needs no code: TorchScript, or, with the suffix ``.pt2``, ``torch.export``.

    Args:
        path: the file.
    """

    path: str

    @override
    def build(self) -> nn.Module:
        if not Path(self.path).exists():
            raise ValueError(
                f"`KnowledgeDistillation(teacher={self.path!r})`: expected 'self', or the path of a TorchScript or "
                "`.pt2` file, found no such file. For a Lightning checkpoint write `CheckpointTeacher(module, path)`."
            )
        if Path(self.path).suffix == ".pt2":
            return torch.export.load(self.path).module()
        scripted: nn.Module = torch.jit.load(self.path, map_location="cpu")  # type: ignore[no-untyped-call]
        return scripted


@dataclass(frozen=True)
class SelfTeacher(TeacherSource):
    """The student itself: as it was when the fit began, or its moving average.

    The only teacher whose weights are in the checkpoints: a resumed run could not find them elsewhere.

    Args:
        decay: None for the student as it was, which suits a trained network that is compressed. In (0, 1): each step
            moves the teacher by ``1 - decay`` towards the student, Tarvainen & Valpola, 2017, "Mean teachers are better
            role models". https://arxiv.org/abs/1703.01780

    Example:
        >>> SelfTeacher(decay=0.999)
        SelfTeacher(decay=0.999)
    """

    decay: float | None = None

    def __post_init__(self) -> None:
        if self.decay is not None and not 0.0 < self.decay < 1.0:
            raise ValueError(
                f"`SelfTeacher(decay={self.decay})`: expected a number in (0, 1), or None for a frozen copy."
            )

    @override
    def build(self) -> nn.Module:
        raise NotImplementedError("made from the student by the callback")


@dataclass(frozen=True)
class LiveTeacher(TeacherSource):
    """What is trained along: a deeper exit of the student, or another part of the LightningModule; never called.

    What it says in the student's own training step counts, without its graph. With an exit: Zhang et al., 2019, "Be
    Your Own Teacher". https://arxiv.org/abs/1905.08094. With two parts of a LightningModule whose ``training_step`` has
    the loss of both, and one `KnowledgeDistillation` for each direction: Zhang et al., 2018, "Deep Mutual Learning".
    https://arxiv.org/abs/1706.00384

    Args:
        path: of the other part; None for the student itself, of which ``output=`` names the exit that learns and
            ``teacher_output=`` the one that teaches, or feature_layers pair early with late layers.

    Example:
        >>> LiveTeacher("second")
        LiveTeacher(path='second')
    """

    path: str | None = None

    @override
    def build(self) -> nn.Module:
        raise NotImplementedError("found in the LightningModule by the callback")


@dataclass(frozen=True, eq=False)
class _Given(TeacherSource):
    module: nn.Module

    @override
    def build(self) -> nn.Module:
        return self.module


def as_source(teacher: Any) -> TeacherSource:
    """What a user may give as a teacher, as a source.

    Raises:
        TypeError: it is nothing that can become a teacher.
    """
    if isinstance(teacher, TeacherSource):
        return teacher
    if isinstance(teacher, str | Path):
        return SelfTeacher() if teacher == "self" else FileTeacher(str(teacher))
    if isinstance(teacher, nn.Module):
        return _Given(teacher)
    if callable(teacher):
        return FactoryTeacher(teacher)
    raise TypeError(
        f"`KnowledgeDistillation(teacher={teacher!r})`: expected a module, a function that makes one, the path of a "
        f"TorchScript or `.pt2` file, 'self', `SelfTeacher` or `CheckpointTeacher`; found {type(teacher).__name__}."
    )


class Teacher:
    """A teacher at work. It is used as it is where device and precision fit, else a copy is.

    Args:
        module: the teacher.
        like: a parameter of the student, whose device and floating type it takes.
        prefix: of its names in the LightningModule, along with which it changes its shape; None: it never does.
    """

    def __init__(self, module: nn.Module, like: Tensor, prefix: str | None = None) -> None:
        self.prefix = prefix
        if any(tensor.device != like.device or _differs(tensor, like) for tensor in _tensors(module)):
            module = _moved(module, like)
        self.module = self.root = module
        self._modes = {part: part.training for part in module.modules()}
        self._checked = False
        if not isinstance(module, torch.fx.GraphModule):  # an exported program has no modes
            module.eval()

    @property
    def is_opaque(self) -> bool:
        """Whether its inner modules cannot be listened to."""
        return isinstance(self.module, torch.jit.ScriptModule | torch.fx.GraphModule)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What it says, without a graph.

        Raises:
            ValueError: at the first call, if it cannot be called like this.
        """
        with torch.no_grad():
            if self._checked:
                return self.module(*args, **kwargs)
            self._check_signature(args, kwargs)
            try:
                output = self.module(*args, **kwargs)
            except (RuntimeError, TypeError) as error:
                raise ValueError(f"{self._complaint(args, kwargs)} It raised: {error}") from error
            self._checked = True
            return output

    def within(self, path: str) -> None:
        """From now on only its part at ``path`` answers, as only this part of the student is called."""
        self.module = self.root.get_submodule(path)

    def release(self) -> None:
        """Give it back in the modes it came in."""
        for part, mode in self._modes.items():
            part.training = mode

    def _check_signature(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.is_opaque:
            return
        try:
            inspect.signature(self.module.forward).bind(*args, **kwargs)
        except TypeError as error:
            raise ValueError(f"{self._complaint(args, kwargs)} Its signature: {error}.") from error

    def _complaint(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        given = ", ".join([*map(_describe, args), *(f"{name}={_describe(value)}" for name, value in kwargs.items())])
        return (
            f"`KnowledgeDistillation(teacher={type(self.module).__name__})`: expected a teacher that takes what the "
            f"student's forward takes, found one that does not take ({given}). Say what it takes: "
            "`inputs=lambda batch: ...`."
        )


def _imported(path: str) -> Any:
    folder, _, name = path.rpartition(".")
    return getattr(importlib.import_module(folder), name)


def shared_parameters(teacher: nn.Module, optimizers: Iterable[Any]) -> int:
    """How many of the teacher's parameters an optimizer is about to change."""
    trained = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return sum(id(parameter) in trained for parameter in teacher.parameters())


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _differs(tensor: Tensor, like: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype != like.dtype


def _moved(module: nn.Module, like: Tensor) -> nn.Module:
    if isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule):
        return module.to(like.device)  # its precision is part of its code
    return copy.deepcopy(module).to(like.device, like.dtype)


def _describe(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
