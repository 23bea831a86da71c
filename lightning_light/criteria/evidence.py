"""Define what a criterion reads, and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

__all__ = ["Criterion", "Evidence", "full_precision", "spread"]


@dataclass(frozen=True, eq=False)
class Evidence:
    """Hold what a criterion may read of one tensor, channels first.

    Attributes:
        weight: shape ``(channels, ...)``; a row is what stays or goes. For a layer that reads the channels this is
            its weight with the input axis in front.
        role: how the tensor depends on the channels: ``"out"`` produces them, ``"in"`` reads them, ``"norm"`` scales
            them, ``"bias"`` shifts them.
        grad: mean gradient over the gathered batches; shape of ``weight``.
        grad_squared: mean over the gathered batches of the squared gradient; shape of ``weight``.
        activation: shape ``(channels,)``; mean absolute activation of each channel.
        inputs: broadcasts to ``weight``; the L2 norm over the gathered batches of the inputs of each weight.
        movement: shape of ``weight``; what `Movement` has accumulated over the optimizer steps so far.
        generator: source of randomness, for criteria that draw.

    Raises:
        ValueError: ``grad``, ``grad_squared`` or ``movement`` differs in shape from ``weight``, or ``activation`` is
            not one number per channel.
    """

    weight: Tensor
    role: Literal["out", "in", "norm", "bias"] = "out"
    grad: Tensor | None = None
    grad_squared: Tensor | None = None
    activation: Tensor | None = None
    generator: torch.Generator | None = None
    inputs: Tensor | None = None
    movement: Tensor | None = None

    def __post_init__(self) -> None:
        whole = self.weight.shape
        shapes = {"grad": whole, "grad_squared": whole, "movement": whole, "activation": whole[:1]}
        for name, shape in shapes.items():
            given = getattr(self, name)
            if given is not None and given.shape != shape:
                raise ValueError(
                    f"`Evidence({name}=...)`: expected shape {tuple(shape)} for a weight of shape "
                    f"{tuple(self.weight.shape)}, found {tuple(given.shape)}. Put the channels first, in both."
                )
        if self.inputs is not None and not _broadcasts(self.inputs, whole):
            raise ValueError(
                f"`Evidence(inputs=...)`: expected a shape that broadcasts to {tuple(whole)}, the norm of what each "
                f"weight is multiplied with, found {tuple(self.inputs.shape)}. Put the inputs on the second axis."
            )

    def need(self, name: Literal["grad", "grad_squared", "activation", "inputs", "movement"]) -> Tensor:
        """Return the evidence ``name``, which the criterion has declared in its ``needs``.

        Raises:
            ValueError: it was not gathered.
        """
        piece: Tensor | None = getattr(self, name)
        if piece is None:
            raise ValueError(
                f"`Evidence({name}=None)`: expected a tensor, because the criterion's `needs` names {name!r}. "
                "Gather it before scoring; a callback reads `needs` and does so."
            )
        return full_precision(piece)


class Criterion(ABC):
    """Score the weights of a tensor; those with the lowest scores are removed first. Keeps no state.

    Subclasses are frozen dataclasses, safe as defaults of arguments. A score of whole channels is spread evenly
    over each row, so that the sum of a row is the score of its channel.

    Attributes:
        needs: what has to be gathered, of ``"grad"``, ``"grad_squared"``, ``"activation"``, ``"inputs"``,
            ``"movement"``, ``"generator"``; ``"gates"`` of `LearnedGates`, which structured pruning alone can train.
        roles: the roles it can read; tensors in other roles do not count.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    roles: ClassVar[frozenset[str]] = frozenset({"out", "in", "norm"})

    @abstractmethod
    def __call__(self, evidence: Evidence) -> Tensor:
        """Return one score per weight, in the shape of ``evidence.weight``; the lowest are removed first."""


def full_precision(tensor: Tensor) -> Tensor:
    """Detach ``tensor`` and convert it to at least float32: the square of a small half-precision number is zero.

    >>> full_precision(torch.tensor(1e-4, dtype=torch.float16)).square().item() > 0
    True
    """
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _broadcasts(tensor: Tensor, shape: torch.Size) -> bool:
    pairs = zip(reversed(tensor.shape), reversed(shape), strict=False)
    return tensor.ndim <= len(shape) and all(size in (1, full) for size, full in pairs)


def spread(channel_scores: Tensor, like: Tensor) -> Tensor:
    """Divide each channel's score evenly over its row of ``like``: shape ``(channels,)`` -> that of ``like``."""
    row = max(1, like[0].numel())
    return (channel_scores / row).reshape(-1, *[1] * (like.dim() - 1)).expand(like.shape)
