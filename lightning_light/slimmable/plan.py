"""Choose the channels of each width: those of a narrower network are among those of a wider one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_light.criteria.evidence import Criterion
from lightning_light.dependency import DependencyGraph
from lightning_light.errors import UnsupportedError
from lightning_light.example_input import ExampleInput
from lightning_light.formatting import human_count, human_percent
from lightning_light.measure.cost import Cost, count_cost
from lightning_light.order import Stage
from lightning_light.slimmable.networks import PlainNetwork, statistics_of
from lightning_light.structured.functional import prune_channels
from lightning_light.structured.options import Widths
from lightning_light.structured.plan import Plan
from lightning_light.structured.scores import layer_of
from lightning_light.surgery.attachment import check_owners
from lightning_light.surgery.edit import trial
from lightning_light.targets import Targets

__all__ = ["METHOD", "STAGE", "WidthOptions", "WidthPlan", "plan_widths"]

METHOD = "slimmable_training"
STAGE = Stage.STRUCTURED + 1  # channel pruning comes before, and what changes layers with their shapes afterwards


@dataclass(frozen=True)
class WidthOptions:
    """How the channels of each width are chosen; see `SlimmableTraining`."""

    widths: Sequence[float]
    criterion: Criterion
    targets: Targets | str | list[str] | None
    round_to: int

    @property
    def narrower(self) -> list[float]:
        """The widths below 1, the widest first."""
        return sorted((width for width in self.widths if width < 1.0), reverse=True)


@dataclass(frozen=True)
class WidthPlan:
    """The networks of all widths.

    Attributes:
        networks: width -> the narrower network.
        costs: width -> MACs and parameters, also of the whole network.
        lines: ``(width 0.5): cost``, then ``layer: its widths``, or why its channels are kept.
    """

    networks: dict[float, PlainNetwork]
    costs: dict[float, Cost]
    lines: list[str]

    @property
    def layers(self) -> list[str]:
        """Names of the layers of which the narrower networks have a part."""
        return sorted({layer_of(name) for network in self.networks.values() for name in network["kept"]})

    def shares(self) -> str:
        """Return the MACs of each width, as shares of those of the whole network."""
        shares = (human_percent(cost.macs / max(self.costs[1.0].macs, 1)) for cost in self.costs.values())
        return f"widths {', '.join(f'{width:g}' for width in self.costs)}: {', '.join(shares)} of the MACs"


def plan_widths(
    model: nn.Module, graph: DependencyGraph, example: ExampleInput, options: WidthOptions, part: str = ""
) -> WidthPlan:
    """Choose the channels of every width, count the costs, and copy the batch-norm statistics.

    Args:
        model: read only.
        graph: of ``model``.
        example: one call of the model.
        options: how channels are chosen.
        part: path of the module that is called; channels that are used outside of it are kept.

    Raises:
        TargetError: the targets match no layer.
        UnsupportedError: no layer can be narrowed, or a method that comes later owns one.
    """
    free = [group for group in graph.groups if group.reason is None]
    check_owners(model, sorted({layer_of(m.tensor) for g in free for m in g.members}), method=METHOD, stage=STAGE)
    prefix = f"{part}." if part else ""
    inside = {group.name for group in free if all(member.tensor.startswith(prefix) for member in group.members)}
    one = example.small(1) if example.method == "forward" else example  # a step may need several samples
    cuts: dict[float, Plan] = {}
    networks: dict[float, PlainNetwork] = {}
    costs = {1.0: count_cost(model, one.args, one.kwargs)}
    for width in options.narrower:
        cuts[width] = prune_channels(
            model,
            example,
            remaining={"*": width},
            criterion=options.criterion,
            targets=options.targets,
            widths=Widths(options.round_to, min_channels=1, min_remaining=0.0),
            graph=graph,
            dry_run=True,
        )
        chosen = {name: mask for name, mask in cuts[width].kept.items() if name in inside}
        kept = graph.kept_positions(chosen)
        with trial(model, kept, graph.attributes(model, chosen)) as edit:
            costs[width] = count_cost(model, one.args, one.kwargs)
        statistics = statistics_of(model, kept, part)
        networks[width] = {"kept": kept, "attributes": edit.attributes, "statistics": statistics}
    layers = list(_layer_lines(list(cuts.values()), inside, part))
    if not any(network["kept"] for network in networks.values()):
        raise UnsupportedError(
            f"`SlimmableTraining(widths={list(options.widths)})` on `{type(model).__name__}`: expected layers that can "
            f"lose channels, found none: {'; '.join(layers) or 'it has no such layers'}. Widen `targets`, or give a "
            "smaller width."
        )
    return WidthPlan(networks, costs, [*_cost_lines(costs), *layers])


def _cost_lines(costs: Mapping[float, Cost]) -> Iterator[str]:
    macs, params = max(costs[1.0].macs, 1), max(costs[1.0].params, 1)
    for width, cost in costs.items():
        counted = f"{human_count(cost.macs)} MACs ({human_percent(cost.macs / macs)})"
        yield f"(width {width:g}): {counted}, {human_count(cost.params)} params ({human_percent(cost.params / params)})"


def _layer_lines(cuts: Sequence[Plan], inside: set[str], part: str) -> Iterator[str]:
    for name, mask in cuts[0].kept.items():
        counts = ", ".join(str(int(cut.kept[name].sum())) for cut in cuts)
        yield f"{name}: " + (
            f"{mask.numel()} -> {counts} channels" if name in inside else f"kept (used outside of `{part}`)"
        )
    yield from (f"{name}: kept ({reason})" for name, reason in cuts[0].skipped.items())
