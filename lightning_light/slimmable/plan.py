"""Choose the channels of each width: those of a narrower network are among those of a wider one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

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
    heads: Literal["dim", "head"]

    @property
    def narrower(self) -> list[float]:
        """The widths below 1, the widest first."""
        return sorted((width for width in self.widths if width < 1.0), reverse=True)


@dataclass
class WidthPlan:
    """The networks of all widths.

    Attributes:
        networks: width, as a string -> the narrower network.
        costs: width -> MACs and parameters.
        lines: ``layer: its widths``, or why its channels are kept; ``(width 0.5): cost``.
    """

    networks: dict[str, PlainNetwork] = field(default_factory=dict)
    costs: dict[float, Cost] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    @property
    def layers(self) -> list[str]:
        """Names of the layers of which the narrower networks have a part."""
        return sorted({layer_of(name) for network in self.networks.values() for name in network["kept"]})


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
    found = WidthPlan(costs={1.0: count_cost(model, one.args, one.kwargs)})
    cuts: dict[float, Plan] = {}
    for width in options.narrower:
        cut = prune_channels(
            model,
            example,
            remaining={"*": width},
            criterion=options.criterion,
            targets=options.targets,
            widths=Widths(options.round_to, min_channels=1, min_remaining=0.0),
            heads=options.heads,
            graph=graph,
            dry_run=True,
        )
        cuts[width] = cut
        chosen = {name: mask for name, mask in cut.kept.items() if name in inside}
        kept = graph.kept_positions(chosen)
        with trial(model, kept, graph.attributes(model, chosen)) as edit:
            found.costs[width] = count_cost(model, one.args, one.kwargs)
        found.networks[str(width)] = {
            "kept": kept,
            "attributes": edit.attributes,
            "statistics": statistics_of(model, kept, part),
        }
    found.lines = _lines(found, list(cuts.values()), inside, part)
    if not found.layers:
        raise UnsupportedError(
            f"`SlimmableTraining(widths={list(options.widths)})` on `{type(model).__name__}`: expected layers that can "
            f"lose channels, found none: {'; '.join(found.lines[len(options.widths) :]) or 'it has no such layers'}. "
            "Widen `targets`, or give a smaller width."
        )
    return found


def _lines(found: WidthPlan, cuts: Sequence[Plan], inside: set[str], part: str) -> list[str]:
    whole = found.costs[1.0]
    lines = [
        f"(width {width:g}): {human_count(cost.macs)} MACs ({human_percent(cost.macs / max(whole.macs, 1))}), "
        f"{human_count(cost.params)} params ({human_percent(cost.params / max(whole.params, 1))})"
        for width, cost in found.costs.items()
    ]
    for name, mask in cuts[0].kept.items():
        counts = [int(cut.kept[name].sum()) for cut in cuts]
        reason = f" (used outside of `{part}`)" if name not in inside else ""
        narrowed = not reason and counts[-1] < mask.numel()
        lines.append(
            f"{name}: {mask.numel()} -> {', '.join(map(str, counts))} channels" if narrowed else f"{name}: kept{reason}"
        )
    return lines + [f"{name}: kept ({reason})" for name, reason in cuts[0].skipped.items()]
