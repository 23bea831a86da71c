"""Widths: how many channels a layer keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_light.criteria import Criterion, Magnitude
from lightning_light.dependency import trace_dependencies
from lightning_light.errors import UnsupportedError
from lightning_light.example_input import ExampleInput
from lightning_light.nas.choices import Change, Choices, Item
from lightning_light.order import Stage
from lightning_light.structured.functional import prune_channels
from lightning_light.structured.options import Widths
from lightning_light.structured.scores import layer_of
from lightning_light.surgery.edit import cut
from lightning_light.targets import Targets
from lightning_light.validation import OpenFraction, validated

__all__ = ["ChannelChoices"]

Cut = tuple[Mapping[str, Mapping[int, Tensor]], Mapping[str, Mapping[str, Any]]]


@validated
@dataclass(frozen=True)
class ChannelChoices(Choices):
    """Keep a fraction of the channels of a layer, as `StructuredPruning` does; coupled channels leave together.

    Args:
        remaining: fractions of a layer's channels that may stay, in (0, 1].
        criterion: the channels with the lowest scores are removed; one that reads weights alone.
        targets: layers whose output channels may be removed: patterns or `Targets`.
        widths: bounds on the number of channels that layers keep.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
        UnsupportedError: the criterion reads more than weights.
    """

    kind = "channels"
    stage = Stage.STRUCTURED

    remaining: tuple[OpenFraction, ...] | list[OpenFraction] = (0.75, 0.5, 0.25)
    criterion: Criterion = Magnitude()
    targets: Targets | str | list[str] | None = None
    widths: Widths = Widths()

    def __post_init__(self) -> None:
        if needs := sorted(self.criterion.needs - {"generator"}):
            raise UnsupportedError(
                f"`ChannelChoices(criterion={self.criterion!r})`: expected a criterion that reads weights alone, found "
                f"one that needs {needs}. Use `Magnitude()`."
            )

    @override
    def items(self, model: nn.Module, example: ExampleInput) -> list[Item]:
        graph = trace_dependencies(model, example.args, example.kwargs)
        found: dict[tuple[str, tuple[int, ...]], Item] = {}  # fractions that leave the same widths are one choice
        makers = {g.name: {layer_of(m.tensor) for m in g.members if m.role == "out"} for g in graph.groups}
        for fraction in self.remaining:
            plan = prune_channels(model, example, remaining={"*": fraction}, **self._options(), graph=graph)
            kept: dict[str, dict[str, int]] = {}
            for group, mask in plan.kept.items():
                if not mask.all():
                    kept.setdefault(group.partition("#")[0], {})[group] = int(mask.sum())
            for target, widths in kept.items():
                layers = frozenset[str]().union(*(makers[group] for group in widths))
                item = Item(self.kind, target, f"{fraction:g}", layers)
                found.setdefault((target, tuple(widths.values())), item)
        return list(found.values())

    @override
    def plan(
        self, model: nn.Module, example: ExampleInput, items: Sequence[Item], calls: Sequence[ExampleInput] = ()
    ) -> Cut:
        graph = trace_dependencies(model, example.args, example.kwargs)
        remaining = {item.target: float(item.choice) for item in items}
        plan = prune_channels(model, example, remaining=remaining, **self._options(), graph=graph)
        return graph.kept_positions(plan.kept), graph.attributes(model, plan.kept)

    @override
    def carry_out(self, model: nn.Module, plan: Cut, **followers: Any) -> Change:
        kept, attributes = plan
        edit = cut(model, kept, attributes=attributes, **followers)
        return Change(edit.entry(), kept)

    def _options(self) -> dict[str, Any]:
        return {"criterion": self.criterion, "targets": self.targets, "widths": self.widths, "dry_run": True}
