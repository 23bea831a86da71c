"""Choices of a search space: what may be done to a network, one target at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_light.example_input import ExampleInput

__all__ = ["Change", "Choices", "Item"]


@dataclass(frozen=True)
class Item:
    """One choice for one target.

    Attributes:
        kind: of the choices, as in ``Choices.kind``.
        target: name of a module.
        choice: what is done to it.
        layers: names of the modules that it changes; a solution has at most one item for each of them.
    """

    kind: str
    target: str
    choice: str
    layers: frozenset[str]

    @property
    def name(self) -> str:
        """Name of the item, for tables and messages."""
        return f"{self.target}: {self.kind} {self.choice}"

    def plain(self) -> dict[str, Any]:
        """Return the item in plain types, for checkpoints."""
        return {**vars(self), "layers": sorted(self.layers)}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Item:
        """Return the item of `plain`."""
        return cls(**{**plain, "layers": frozenset(plain["layers"])})


@dataclass(frozen=True)
class Change:
    """What was done to a network.

    Attributes:
        entry: of the edit log.
        kept: tensor name -> dimension -> positions that stayed, where channels were removed; else None.
        method: that owns the changed layers from now on; an empty string if none does.
        layers: those that it owns.
        follows_cuts: whether channels of these layers may be removed afterwards.
    """

    entry: Mapping[str, Any]
    kept: Mapping[str, Mapping[int, Tensor]] | None = None
    method: str = ""
    layers: tuple[str, ...] = ()
    follows_cuts: bool = False


class Choices(ABC):
    """One kind of change, with its choices for every target; a frozen dataclass.

    A new kind is one file with one subclass.

    Attributes:
        kind: its name in tables.
        stage: its place in a chain of methods, of `lightning_light.order.Stage`.
    """

    # No annotations: jsonargparse would resolve them in the module of each subclass.
    kind = ""
    stage = 0

    @abstractmethod
    def items(self, model: nn.Module, example: ExampleInput) -> list[Item]:
        """List the choices for every target in ``model``, which is left as it is.

        Raises:
            TargetError: the targets match nothing.
        """

    @abstractmethod
    def plan(
        self, model: nn.Module, example: ExampleInput, items: Sequence[Item], calls: Sequence[ExampleInput] = ()
    ) -> Any:
        """Plan how ``items`` are carried out on ``model``, which is left as it is; the plan can be pickled.

        Args:
            model: the network.
            example: one call of it.
            items: of this kind.
            calls: of the network in the calibration batches; none where only shapes are counted.
        """

    @abstractmethod
    def carry_out(
        self, model: nn.Module, plan: Any, *, optimizers: Iterable[Any] = (), averaged_models: Sequence[nn.Module] = ()
    ) -> Change:
        """Change ``model``, its averaged copies and its optimizers as planned.

        Raises:
            UnsupportedError: a later method owns one of the layers; nothing is changed.
        """
