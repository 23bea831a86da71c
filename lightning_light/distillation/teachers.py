"""Teacher sources: a module, a checkpoint, a file, a factory, the student itself, or a module trained along."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn
from typing_extensions import override

from lightning_light.surgery.checkpoint import load_from_checkpoint
from lightning_light.validation import Range, validated
from lightning_light.warning_filters import ignored_warnings

__all__ = [
    "BuiltTeacher",
    "CheckpointTeacher",
    "FactoryTeacher",
    "FileTeacher",
    "OnlineTeacher",
    "SelfTeacher",
    "TeacherSource",
    "as_source",
]


class TeacherSource(ABC):
    """Base class of teacher sources: frozen values, so that they can be written in YAML."""

    @property
    @abstractmethod
    def is_constant(self) -> bool:
        """Whether the teacher's outputs for a sample stay the same during a fit."""


class BuiltTeacher(TeacherSource):
    """A teacher that is built when a fit begins and is independent of the student."""

    is_constant = True

    @abstractmethod
    def build(self) -> nn.Module:
        """Build the teacher."""


@validated
@dataclass(frozen=True)
class CheckpointTeacher(BuiltTeacher):
    """Load a LightningModule, compressed or not, from its checkpoint as the teacher.

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


@validated
@dataclass(frozen=True)
class FactoryTeacher(BuiltTeacher):
    """Build the teacher by calling a class or function when a fit begins.

    Args:
        factory: a class or function, or, for instance in YAML, its import path.
        arguments: keyword arguments of the call.

    Example:
        >>> FactoryTeacher("torch.nn.Linear", {"in_features": 3, "out_features": 2}).build()
        Linear(in_features=3, out_features=2, bias=True)
    """

    factory: str | Callable[..., nn.Module]
    arguments: dict[str, Any] = field(default_factory=dict)

    @override
    def build(self) -> nn.Module:
        factory = _imported(self.factory) if isinstance(self.factory, str) else self.factory
        built = factory(**self.arguments)
        if not isinstance(built, nn.Module):
            raise TypeError(
                f"`KnowledgeDistillation(teacher={self.factory!r})`: expected a function that returns a module, found "
                f"one that returns {type(built).__name__}."
            )
        return built


@validated
@dataclass(frozen=True)
class FileTeacher(BuiltTeacher):
    """Load the teacher from a TorchScript file or, with the suffix ``.pt2``, a ``torch.export`` file.

    Args:
        path: the file.

    Raises:
        ValueError: when a fit begins: torch does not load the file.
    """

    path: str

    @override
    def build(self) -> nn.Module:
        if not Path(self.path).exists():
            raise ValueError(
                f"`KnowledgeDistillation(teacher={self.path!r})`: expected 'self', or the path of a TorchScript or "
                "`.pt2` file, found no such file. For a Lightning checkpoint write `CheckpointTeacher(module, path)`."
            )
        try:
            if Path(self.path).suffix == ".pt2":
                return torch.export.load(self.path).module()
            with ignored_warnings(r"`torch\.jit\.\w+` is deprecated"):
                scripted: nn.Module = torch.jit.load(self.path, map_location="cpu")  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError, LookupError, OSError) as error:
            raise ValueError(
                f"`KnowledgeDistillation(teacher={self.path!r})`: expected a TorchScript or `.pt2` file, found one "
                f"that torch does not load as such: {next(iter(str(error).splitlines()), type(error).__name__)} For a "
                "Lightning checkpoint write `CheckpointTeacher(module, path)`; for a state dict load it into a "
                "module, and give the module."
            ) from error
        return scripted


@validated
@dataclass(frozen=True)
class SelfTeacher(TeacherSource):
    """Self-distillation: use a copy of the student at the start of the fit, or its moving average, as the teacher.

    The only teacher whose weights are in the checkpoints, because a resumed run has no other source for them.

    Args:
        decay: None for the copy at the start, which suits a trained network that is compressed. In (0, 1): each step
            moves the teacher by ``1 - decay`` towards the student, Tarvainen & Valpola, 2017, "Mean teachers are better
            role models". https://arxiv.org/abs/1703.01780

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> SelfTeacher(decay=0.999)
        SelfTeacher(decay=0.999)
    """

    decay: Annotated[float, Range(0.0, 1.0, above=True, below=True)] | None = None

    @property
    @override
    def is_constant(self) -> bool:
        return self.decay is None


@validated
@dataclass(frozen=True)
class OnlineTeacher(TeacherSource):
    """Online distillation: use a deeper exit of the student, or another part of the LightningModule, as the teacher.

    The teacher is trained along with the student and not called by the callback: its outputs in ``training_step`` are
    used, detached. With an exit: Zhang et al., 2019, "Be Your Own Teacher". https://arxiv.org/abs/1905.08094. With two
    networks in one LightningModule whose ``training_step`` has the loss of both, and one `KnowledgeDistillation` per
    direction: Zhang et al., 2018, "Deep Mutual Learning". https://arxiv.org/abs/1706.00384

    Args:
        path: of the other part; None for an exit of the student itself. Then ``output=`` names the exit that is
            distilled and ``teacher_output=`` the exit it learns from, or ``feature_layers`` pair early and late layers.

    Example:
        >>> OnlineTeacher("second")
        OnlineTeacher(path='second')
    """

    path: str | None = None

    is_constant = False


@dataclass(frozen=True, eq=False)
class _GivenTeacher(BuiltTeacher):
    module: nn.Module

    @override
    def build(self) -> nn.Module:
        return self.module


def as_source(teacher: Any) -> TeacherSource:
    """Convert the argument ``teacher`` of `KnowledgeDistillation` to a source.

    Raises:
        TypeError: it is of another type than those listed there.
    """
    if isinstance(teacher, TeacherSource):
        return teacher
    if isinstance(teacher, str | Path):
        return SelfTeacher() if teacher == "self" else FileTeacher(str(teacher))
    if isinstance(teacher, nn.Module):
        return _GivenTeacher(teacher)
    if callable(teacher) and not (isinstance(teacher, type) and issubclass(teacher, TeacherSource)):
        return FactoryTeacher(teacher)
    raise TypeError(
        f"`KnowledgeDistillation({teacher!r})`: expected a module, a function that builds one, the path of a "
        f"TorchScript or `.pt2` file, 'self', `SelfTeacher()` or `CheckpointTeacher(...)`; found "
        f"{type(teacher).__name__}. For self-distillation write `KnowledgeDistillation('self')`."
    )


def _imported(path: str) -> Any:
    folder, _, name = path.rpartition(".")
    return getattr(importlib.import_module(folder), name)
