"""Record snapshots of a model during a run, and count its MACs after each structural change."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, TypedDict

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_light.capture import Capture
from lightning_light.example_input import ExampleInput
from lightning_light.isolation import FORWARD_ERRORS
from lightning_light.measure.cost import Cost, count_cost
from lightning_light.measure.history import History, PlainHistory
from lightning_light.measure.snapshot import PlainSnapshot, Snapshot, matrix_layers, structure, take_snapshot
from lightning_light.schema import Needs, PlainExample
from lightning_light.targets import inside
from lightning_light.training_step import callable_with

__all__ = ["CostCounter", "PlainRecorder", "Recorder", "is_countable"]

# Errors of the user's forward pass on an input that it was not written for: they end the count, not the training.


class PlainRecorder(TypedDict, total=False):
    """A `Recorder` in a checkpoint, and one call of the network."""

    example: PlainExample
    before: Annotated[PlainSnapshot, Needs("history", "layers", "now")]
    now: PlainSnapshot
    history: PlainHistory
    layers: list[str]


class Recorder:
    """Record snapshots of one model.

    Args:
        model: before it is compressed.
        cost: of a forward pass; None while it is not known.
        layers: names of the layers that are reported individually; None: all with a weight of two or more dimensions.

    Attributes:
        before: the first snapshot.
        now: the latest snapshot.
        history: of all snapshots.
        layers: names of the layers that are reported individually.
    """

    def __init__(self, model: nn.Module, cost: Cost | None, *, layers: Sequence[str] | None = None) -> None:
        self.before = self.now = take_snapshot(model, cost)
        self.layers = matrix_layers(model) if layers is None else list(layers)
        rows = [row.name for row in self.before.rows]
        self.history = History.of(self.before, [name for name in rows if inside(name, self.layers)])
        self._first_structure = structure(model) if cost is None else None  # until its MACs are known

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], model: nn.Module, cost: Cost | None) -> Recorder:
        """Restore what `plain` returned."""
        recorder = cls(model, cost, layers=plain["layers"])
        recorder.before = Snapshot.from_plain(plain["before"])
        recorder.history = History.from_plain(plain["history"])
        recorder._first_structure = None
        return recorder

    def plain(self) -> dict[str, Any]:
        """Return plain types, for a checkpoint."""
        parts = {"before": self.before.plain(), "now": self.now.plain(), "history": self.history.plain()}
        return {**parts, "layers": list(self.layers)}

    def update(
        self, model: nn.Module, cost: Cost | None, step: int, stats: Mapping[str, Mapping[str, float]] | None = None
    ) -> None:
        """Take a snapshot. The first known cost is also that of the first snapshot, if the structure is the same."""
        self.now = take_snapshot(model, cost, stats)
        if cost is not None and self._first_structure is not None:
            if self._first_structure == structure(model):
                self.before = self.now.with_sparsity_of(self.before)
            self._first_structure = None
        self.history = self.history.extended(step, self.before, self.now)


class CostCounter:
    """Count the cost per sample, again only after a structural change.

    Args:
        captured: holds the example input as soon as there is one.
        caller: the callback, for the warning.
    """

    def __init__(self, captured: Capture, caller: str) -> None:
        self.captured = captured
        self._caller = caller
        self._failed = False
        self._structure: int | None = None
        self._cost: Cost | None = None

    def __call__(self, model: nn.Module) -> Cost | None:
        """Return the cost of ``model``; None without an example input that fits."""
        example = self.captured.example
        if example is None or self._failed:
            return None
        current = structure(model)
        if self._structure != current:
            try:
                self._cost = _cost_per_sample(model, example.to(model))
            except FORWARD_ERRORS as error:
                self._failed, self._cost = True, None
                warnings.warn(
                    f"`{self._caller}` reports no MACs: `{type(model).__name__}.{example.method}` does not run on the "
                    f"example input ({type(error).__name__}: {error}). Set an `example_input_array` that fits.",
                    stacklevel=2,
                )
            self._structure = current
        return self._cost


def is_countable(model: nn.Module) -> bool:
    """Check whether every parameter has a shape; those of lazy layers get one in the first forward pass."""
    return not any(is_lazy(parameter) for parameter in model.parameters())


def _cost_per_sample(model: nn.Module, example: ExampleInput) -> Cost:
    with callable_with(model, example):
        cost = count_cost(model, example.args, example.kwargs)
    by_module = {name: macs // example.samples for name, macs in cost.macs_by_module.items()}
    return replace(cost, macs=cost.macs // example.samples, macs_by_module=by_module)
