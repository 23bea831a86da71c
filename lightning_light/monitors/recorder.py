"""A model's way from what it was to what it is, and what a forward pass of it costs along the way."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_light.example_input import Capture, ExampleInput
from lightning_light.measure.cost import Cost, count_cost
from lightning_light.monitors.history import History
from lightning_light.monitors.layer_matching import belongs
from lightning_light.monitors.snapshot import Snapshot, matrix_layers, structure, take_snapshot

__all__ = ["Recorder", "CostCounter", "is_countable"]

# What a forward pass of the user's may raise on an input that it was not made for: it ends the count, not the training.
_FORWARD_ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class Recorder:
    """Looks at one model again and again.

    Args:
        model: as it is before anything is done to it.
        cost: of a forward pass; None while it is not known.
        layers: names of the layers that are reported one by one; None: all with a weight of two or more dimensions.

    Attributes:
        before: the model as it was.
        now: the model as it was found at the last look.
        history: all looks.
        layers: names of the layers that are reported one by one.
    """

    def __init__(self, model: nn.Module, cost: Cost | None, *, layers: Sequence[str] | None = None) -> None:
        self.before = self.now = take_snapshot(model, cost)
        self.layers = matrix_layers(model) if layers is None else list(layers)
        rows = [row.name for row in self.before.rows]
        self.history = History.of(self.before, [name for name in rows if belongs(name, self.layers)])
        self._first_structure = structure(model) if cost is None else None  # as long as its MACs are not known

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], model: nn.Module, cost: Cost | None) -> Recorder:
        """Go on with what `plain` gave."""
        recorder = cls(model, cost, layers=plain["layers"])
        recorder.before = Snapshot.from_plain(plain["before"])
        recorder.history = History.from_plain(plain["history"])
        recorder._first_structure = None
        return recorder

    def plain(self) -> dict[str, Any]:
        """In plain types, for a checkpoint."""
        return {"before": self.before.plain(), "history": self.history.plain(), "layers": list(self.layers)}

    def look(
        self, model: nn.Module, cost: Cost | None, step: int, facts: Mapping[str, Mapping[str, float]] | None = None
    ) -> None:
        """See what the model is now. The first cost that is known is also that of a start with the same structure."""
        self.now = take_snapshot(model, cost, facts)
        if cost is not None and self._first_structure is not None:
            if self._first_structure == structure(model):
                self.before = self.now.with_zeros_of(self.before)
            self._first_structure = None
        self.history = self.history.extended(step, self.before, self.now)


class CostCounter:
    """Counts what one sample costs, anew only after a change of structure.

    Args:
        captured: where the example input is, or will be as soon as there is one.
    """

    def __init__(self, captured: Capture) -> None:
        self.captured = captured
        self._failed = False
        self._structure: int | None = None
        self._cost: Cost | None = None

    def __call__(self, model: nn.Module) -> Cost | None:
        """The cost of ``model`` as it is now; None if there is no example yet, or none that fits."""
        example = self.captured.example
        if example is None or self._failed:
            return None
        current = structure(model)
        if self._structure != current:
            try:
                self._cost = _cost_of_a_sample(model, example.to(model))
            except _FORWARD_ERRORS as error:
                self._failed, self._cost = True, None
                warnings.warn(
                    f"`CompressionMonitor` reports no MACs: `{type(model).__name__}.forward` does not run on the "
                    f"example input ({type(error).__name__}: {error}). Set an `example_input_array` that fits.",
                    stacklevel=2,
                )
            self._structure = current
        return self._cost


def is_countable(model: nn.Module) -> bool:
    """Whether every parameter has a shape: those of lazy layers get one in the first forward pass."""
    return not any(is_lazy(parameter) for parameter in model.parameters())


def _cost_of_a_sample(model: nn.Module, example: ExampleInput) -> Cost:
    cost = count_cost(model, example.args, example.kwargs)
    by_module = {name: macs // example.samples for name, macs in cost.macs_by_module.items()}
    return replace(cost, macs=cost.macs // example.samples, macs_by_module=by_module)
