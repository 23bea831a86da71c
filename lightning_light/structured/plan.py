"""Plan which channels a cut removes. The model is only read."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from typing_extensions import override

from lightning_light.budgets import Budget
from lightning_light.criteria.gathered import Gathered
from lightning_light.criteria.learned_gates import GateProblem
from lightning_light.dependency import ChannelGroup, DependencyGraph
from lightning_light.errors import BudgetError, UnsupportedError
from lightning_light.example_input import ExampleInput
from lightning_light.formatting import DataTable, Tabular, layer_lines
from lightning_light.measure.latency_table import LatencyTable, lowered
from lightning_light.order import Stage
from lightning_light.structured.costs import Estimator, FileEstimator, smallest
from lightning_light.structured.options import ChannelPruningOptions
from lightning_light.structured.ranking import Ranking, removal_order
from lightning_light.structured.scores import check_scorable, layer_of, score_groups
from lightning_light.structured.sensitivity import Sensitivity, measure_curves, order_by_curves
from lightning_light.surgery.attachment import check_owners
from lightning_light.targets import Targets, as_targets

__all__ = ["Goal", "Plan", "check_prunable", "check_run", "gate_problem", "plan_channels", "widths_of"]

_ROUNDING = 1e-9
_REACH, _GAIN = 20, 2e-3  # an expensive channel is replaced by at most 1 / 20 of all, where that leaves 0.2 % more


@dataclass(frozen=True, eq=False)
class Goal:
    """What a run of cuts is to reach, and how much of the way one of them goes.

    Attributes:
        budget: None where ``ChannelPruningOptions.remaining`` alone limits the widths.
        example: one call of the model.
        original: group name -> width before the first cut.
        dense: the budget's quantity before compression.
        fraction: of the way, in [0, 1]; 1 is the last cut.
        seed: for criteria that draw.
        calls: of the model, for `Sensitivity`.
        curves: those of `Sensitivity`, where they have been measured.
        table: for a budget of latency in a runtime.
    """

    budget: Budget | None
    example: ExampleInput
    original: Mapping[str, int]
    dense: float = 0.0
    fraction: float = 1.0
    seed: int = 0
    calls: Sequence[ExampleInput] = ()
    curves: Mapping[str, Tensor] = field(default_factory=dict)
    table: LatencyTable | None = None


@dataclass(frozen=True, eq=False)
class Plan(Tabular):
    """What a cut removes.

    Attributes:
        kept: group name -> boolean mask of the channels that stay, shape ``(width,)``.
        before: the budget's quantity before the cut.
        after: the same after it, counted or measured; equal to ``before`` without a budget.
        skipped: group name -> why its channels stay.
        curves: group name -> distance of the outputs without 0, 1, ... of its channels, of `Sensitivity`.
        estimated: ``after`` as it was estimated, where the written file was measured.
    """

    kept: dict[str, Tensor] = field(default_factory=dict)
    before: float = 0.0
    after: float = 0.0
    skipped: dict[str, str] = field(default_factory=dict)
    curves: Mapping[str, Tensor] = field(default_factory=dict)
    estimated: float | None = None

    @property
    def removed(self) -> int:
        """The number of channels removed."""
        return sum(int((~mask).sum()) for mask in self.kept.values())

    def cuts(self) -> list[str]:
        """Describe each layer that loses channels, one line per layer."""
        cut = {name: mask for name, mask in self.kept.items() if not mask.all()}
        return [f"{name}: {mask.numel()} -> {int(mask.sum())} channels" for name, mask in cut.items()]

    def lines(self) -> list[str]:
        """Describe each layer: its new width, or why its channels are kept."""
        return self.cuts() + [f"{name}: kept ({reason})" for name, reason in self.skipped.items()]

    @override
    def tables(self) -> list[DataTable]:
        """Return one line per layer."""
        return [layer_lines(self.lines())]


def check_prunable(model: nn.Module) -> None:
    """Refuse layers that other tools have prepared with the present shapes: masks, and fake quantization of PyTorch.

    Raises:
        UnsupportedError: names the layer and the right order.
    """
    for name, module in model.named_modules():
        if any(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values()):
            raise UnsupportedError(
                f"Channel pruning of `{name}`: expected a layer without a mask, found one of "
                "`torch.nn.utils.prune`, which would keep the old shape. Make it permanent first, "
                "`torch.nn.utils.prune.remove(layer, 'weight')`, or mask after channels are removed."
            )
        if hasattr(module, "weight_fake_quant") or hasattr(module, "activation_post_process"):
            raise UnsupportedError(
                f"Channel pruning of `{name}`: expected a float layer, found one prepared for quantization by "
                "`torch.ao`, whose ranges belong to the present channels. Prune first, then quantize."
            )


def check_run(model: nn.Module, graph: DependencyGraph, options: ChannelPruningOptions, goal: Goal) -> None:
    """Refuse a run whose last cut could not be made, before the first.

    Args:
        model: read only.
        graph: of ``model`` as it is.
        options: how channels are chosen.
        goal: of the run; its ``fraction`` does not matter.

    Raises:
        BudgetError: the budget cannot be reached, even with every layer at its smallest width.
        TargetError: ``options.targets`` or a pattern of ``options.remaining`` matches nothing.
        UnsupportedError: the criterion reads no tensor of a layer, or a later method owns a layer.
    """
    check_prunable(model)
    candidates = _Candidates.of(model, graph, options, goal.original)
    check_scorable(candidates.groups, options.criterion)
    met = candidates.has_fixed_widths()
    if goal.budget is not None:
        estimator = _estimator(model, graph, candidates, goal)
        _check_reachable(candidates, estimator, goal)
        met = met and estimator.now <= goal.budget.goal(goal.dense)
    if not met:
        layers = {layer_of(member.tensor) for group in candidates.groups for member in group.members}
        check_owners(model, sorted(layers), method="structured_pruning", stage=Stage.STRUCTURED)


def plan_channels(
    model: nn.Module, graph: DependencyGraph, options: ChannelPruningOptions, goal: Goal, gathered: Gathered
) -> Plan:
    """Choose the fewest channels, least important first, whose removal brings the model ``goal.fraction`` of the way.

    Args:
        model: read only.
        graph: of ``model`` as it is.
        options: how channels are chosen.
        goal: how far.
        gathered: the evidence that the criterion needs.

    Raises:
        BudgetError: the goal of the whole run cannot be reached, even with every layer at its smallest width.
        TargetError: ``options.targets`` or a pattern of ``options.remaining`` matches nothing.
        UnsupportedError: the criterion cannot score a layer.
    """
    candidates = _Candidates.of(model, graph, options, goal.original)
    scores = score_groups(model, candidates.groups, options.criterion, options.ranking, gathered, goal.seed)
    fixed = {name: _mask(scores[name], width) for name, width in candidates.fixed_widths(goal.fraction).items()}
    if goal.budget is None:
        return Plan(fixed, skipped=candidates.skipped)
    estimator = _estimator(model, graph, candidates, goal)
    _check_reachable(candidates, estimator, goal)
    if not candidates.ranked:
        return Plan(fixed, estimator.now, estimator.exact(fixed), candidates.skipped)
    order, curves = _order(model, candidates.ranked, scores, options.ranking, goal)
    search = _Search(candidates, scores, order, fixed, estimator)
    limit, estimated = goal.budget.at(goal.dense, goal.fraction) * (1.0 + _ROUNDING), None
    kept, value = search.solve(limit)
    if isinstance(estimator, FileEstimator) and goal.fraction == 1.0:
        kept, estimated, value = _met_by_file(search, estimator, limit)
    return Plan(kept, estimator.now, value, candidates.skipped, curves, estimated)


def _met_by_file(search: _Search, estimator: FileEstimator, limit: float) -> tuple[dict[str, Tensor], float, float]:
    """Lower the limit of the estimates until the file meets it; return masks, estimated and measured seconds."""
    target = limit
    while True:
        kept, estimated = search.solve(target)
        seconds = estimator.file(kept)
        if seconds <= limit or target < search.least:
            return kept, estimated, seconds
        target = lowered(target, estimated, seconds, limit)


def _order(
    model: nn.Module, groups: Sequence[ChannelGroup], scores: Mapping[str, Tensor], ranking: Ranking, goal: Goal
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The index of the group that loses a channel next, and the curves that `Sensitivity` has measured."""
    if isinstance(ranking, Sensitivity):
        curves = goal.curves
        if any(g.name not in curves or curves[g.name].numel() < g.width for g in groups):
            curves = measure_curves(model, groups, scores, ranking, goal.calls)
        return order_by_curves(groups, curves), curves
    scopes = [ranking.scope(group, model) for group in groups]
    return removal_order(groups, scores, scopes, goal.original)[0], {}


def gate_problem(model: nn.Module, graph: DependencyGraph, options: ChannelPruningOptions, goal: Goal) -> GateProblem:
    """Return what `LearnedGates` are trained for; arguments as in `plan_channels`."""
    assert goal.budget is not None  # of `check_gates`
    candidates = _Candidates.of(model, graph, options, goal.original)
    estimator = _estimator(model, graph, candidates, goal)
    wanted = goal.budget.at(goal.dense, goal.fraction) / estimator.now
    floors = torch.tensor([candidates.floors[group.name] for group in candidates.groups], dtype=torch.double)
    return GateProblem(
        candidates.groups, lambda widths: estimator.interpolate(widths) / estimator.now, wanted, floors, goal.example
    )


@dataclass(frozen=True, eq=False)
class _Candidates:
    """The groups that may lose channels, and the bounds on their widths.

    Attributes:
        groups: those that may lose channels.
        skipped: group name -> why the others may not.
        original: group name -> width before the first cut.
        floors: group name -> its smallest width.
        steps: group name -> its widths are multiples of this.
        remaining: group name -> fraction of its channels that stays, where the user has set it.
    """

    groups: list[ChannelGroup]
    skipped: dict[str, str]
    original: Mapping[str, int]
    floors: dict[str, int]
    steps: dict[str, int]
    remaining: dict[str, float]

    @classmethod
    def of(
        cls, model: nn.Module, graph: DependencyGraph, options: ChannelPruningOptions, original: Mapping[str, int]
    ) -> _Candidates:
        """Sort the groups of ``graph``, and compute the bounds on their widths."""
        groups, skipped = _sorted_groups(model, graph, as_targets(options.targets))
        floors, steps = {}, {}
        for group in groups:
            positions = next((m.index.shape[1] for m in group.members if m.role == "out"), 1)
            steps[group.name] = options.widths.round_to // math.gcd(options.widths.round_to, positions)
            least = math.ceil(original[group.name] * options.widths.min_remaining - _ROUNDING)
            wanted = max(1, math.ceil(options.widths.min_channels / positions), least)
            floors[group.name] = min(group.width, wanted)
        layers = {
            name: fraction
            for pattern, fraction in (options.remaining or {}).items()
            for name in as_targets(pattern).select(model)
        }
        remaining = {g.name: layers[layer] for g in groups if (layer := g.name.partition("#")[0]) in layers}
        return cls(groups, skipped, original, floors, steps, remaining)

    @property
    def ranked(self) -> list[ChannelGroup]:
        """The groups whose widths the budget decides."""
        return [group for group in self.groups if group.name not in self.remaining]

    def fixed_widths(self, fraction: float) -> dict[str, int]:
        """Group name -> width, ``fraction`` of the way to `remaining`."""
        widths = {}
        for group in self.groups:
            if group.name in self.remaining:
                removed = fraction * (1.0 - self.remaining[group.name])
                wanted = max(self.floors[group.name], round(self.original[group.name] * (1.0 - removed)))
                widths[group.name] = self._rounded(group, wanted)
        return widths

    def has_fixed_widths(self) -> bool:
        """Whether every layer of `remaining` has its final width."""
        widths = self.fixed_widths(1.0)
        return all(group.width == widths.get(group.name, group.width) for group in self.groups)

    def smallest_widths(self) -> dict[str, int]:
        """Group name -> the smallest width that it can end at."""
        ranked = {group.name: self._rounded(group, self.floors[group.name]) for group in self.ranked}
        return {**ranked, **self.fixed_widths(1.0)}

    def _rounded(self, group: ChannelGroup, width: int) -> int:
        step = self.steps[group.name]
        return min(group.width, math.ceil(width / step) * step)


def _estimator(model: nn.Module, graph: DependencyGraph, candidates: _Candidates, goal: Goal) -> Estimator:
    assert goal.budget is not None
    if goal.table is None:
        return Estimator(model, graph, candidates.groups, goal.budget, goal.example)
    return FileEstimator(model, graph, candidates.groups, goal.budget, goal.example, goal.table)


def _check_reachable(candidates: _Candidates, estimator: Estimator, goal: Goal) -> None:
    """Refuse a budget that is not met with every layer at its smallest width."""
    assert goal.budget is not None
    wanted = goal.budget.goal(goal.dense)
    if estimator.now <= wanted:
        return
    widths = candidates.smallest_widths()
    least = estimator.least({g.name: torch.arange(g.width) < widths[g.name] for g in candidates.groups})
    if least > wanted * (1.0 + _ROUNDING):
        raise BudgetError(
            f"`{goal.budget!r}` cannot be reached: expected {goal.budget.quantity} <= {wanted:.6g}, found {least:.6g} "
            f"with every layer at its smallest width ({estimator.now:.6g} now). Lower `min_channels`, `min_remaining` "
            "or `round_to` of `widths`, widen `targets`, or give a milder budget."
        )


class _Search:
    """Find how many channels of a removal order to remove."""

    def __init__(
        self,
        candidates: _Candidates,
        scores: Mapping[str, Tensor],
        order: Tensor,
        fixed: Mapping[str, Tensor],
        estimator: Estimator,
    ) -> None:
        ranked = candidates.ranked
        self._ranked, self._scores, self._order, self._fixed = ranked, scores, order, dict(fixed)
        self._estimator = estimator
        self._now = torch.tensor([group.width for group in ranked])
        self._floor = torch.tensor([candidates.floors[group.name] for group in ranked])
        self._step = torch.tensor([candidates.steps[group.name] for group in ranked])
        self._names = [group.name for group in candidates.groups]

    @property
    def least(self) -> float:
        """The estimate with every layer at its smallest width."""
        return self._estimate(self._order.numel())

    def solve(self, limit: float) -> tuple[dict[str, Tensor], float]:
        """Return the masks of the fewest removals that reach ``limit``, and the quantity that they leave.

        The last channel of the order may cost more than is still missing. It is kept where cheaper ones that follow it
        are enough and leave more. Where only layers with a width of their own keep the model above ``limit``, all
        others go to their smallest.
        """
        if self._estimate(0) <= limit:
            return self.masks(0), self._estimate(0)
        best = tried = (self, *self._smallest(limit))
        most = best[1] + max(1, self._order.numel() // _REACH)
        for _ in self._ranked:
            cheaper = tried[0]._without_last(tried[1], most, limit) if best[2] + _GAIN * limit < limit else None
            if cheaper is None:
                break
            tried = cheaper
            best = tried if best[2] + _GAIN * limit < tried[2] else best
        return best[0].masks(best[1]), best[2]

    def masks(self, count: int) -> dict[str, Tensor]:
        """Return group name -> channels that stay when the first ``count`` of the order are removed."""
        widths = self._widths(count).tolist()
        mine = {g.name: _mask(self._scores[g.name], width) for g, width in zip(self._ranked, widths, strict=True)}
        return {**self._fixed, **mine}

    def _widths(self, count: int) -> Tensor:
        removed = torch.bincount(self._order[:count], minlength=len(self._ranked))
        stays = torch.maximum(self._now - removed, self._floor)
        return torch.minimum((stays + self._step - 1) // self._step * self._step, self._now)

    def _estimate(self, count: int) -> float:
        widths = dict(zip((group.name for group in self._ranked), self._widths(count).tolist(), strict=True))
        widths |= {name: int(mask.sum()) for name, mask in self._fixed.items()}
        return self._estimator(torch.tensor([widths[name] for name in self._names]))

    def _without_last(self, count: int, most: int, limit: float) -> tuple[_Search, int, float] | None:
        """Try the order in which the channel at ``count - 1``, and what its layer loses after it, comes last.

        Returns:
            The search, count and value with it; None where more than the first ``most`` of the order would have to be
            removed, and for quantities that are measured with noise.
        """
        if count == 0 or self._estimator.is_noisy:
            return None
        rest = self._order[count - 1 :]
        postponed = rest == rest[0]
        other = copy.copy(self)
        other._order = torch.cat([self._order[: count - 1], rest[~postponed], rest[postponed]])
        most = min(most, count - 1 + int((~postponed).sum()))
        if other._estimate(most) > limit:
            return None
        found, left = other._smallest(limit)
        return (other, found, left) if found <= most and left <= limit else None

    def _smallest(self, limit: float) -> tuple[int, float]:
        """Return the smallest number of removals that reaches ``limit``, and the quantity that it leaves."""
        total = self._order.numel()
        return self._corrected(smallest(lambda n: self._estimate(n) <= limit, 0, total), total, limit)

    def _corrected(self, guess: int, total: int, limit: float) -> tuple[int, float]:
        """Search around the estimate with counted or measured values, for work that the estimate does not see."""
        values: dict[int, float] = {}

        def fits(count: int) -> bool:
            values[count] = self._estimator.exact(self.masks(count))
            return values[count] <= limit

        stride = max(1, total // 64)
        if fits(guess):
            if math.isclose(values[guess], self._estimate(guess), rel_tol=1e-6):
                return guess, values[guess]
            high = guess
            while high > 0 and fits(max(0, high - stride)):
                high, stride = max(0, high - stride), 2 * stride
            low = max(0, high - stride)
        else:
            low, high = guess + 1, min(total, guess + stride)
            while high < total and not fits(high):
                low, stride = high + 1, 2 * stride
                high = min(total, high + stride)
        best = smallest(fits, low, high)
        if best not in values:
            fits(best)
        return best, values[best]


def _sorted_groups(
    model: nn.Module, graph: DependencyGraph, targets: Targets
) -> tuple[list[ChannelGroup], dict[str, str]]:
    """The groups that may lose channels, and why each other may not."""
    chosen = {*targets.select(model), *([""] if targets == Targets() else [])}  # the model's own parameters too
    free, skipped = [], {}
    for group in graph.groups:
        makers = {layer_of(member.tensor) for member in group.members if member.role == "out"}
        if not makers:
            continue
        if group.reason is not None:
            skipped[group.name] = group.reason
        elif makers - chosen:
            skipped[group.name] = f"`targets` exclude {', '.join(sorted(makers - chosen)[:3])}"
        elif group.width < 2:
            skipped[group.name] = _why_single(group)
        else:
            free.append(group)
    return free, skipped


def _why_single(group: ChannelGroup) -> str:
    """Explain why a group that is free has nothing to remove."""
    positions = max(member.index.shape[1] for member in group.members if member.role == "out")
    if positions == 1:
        return "it has one channel"
    return (
        f"its {positions} channels can only be removed together: a norm over groups of channels, a grouped "
        "convolution or a reshape needs the same position of every group, and there is one per group"
    )


def _mask(scores: Tensor, width: int) -> Tensor:
    mask = torch.ones(scores.numel(), dtype=torch.bool)
    mask[torch.argsort(scores, stable=True)[: scores.numel() - width]] = False
    return mask


def widths_of(graph: DependencyGraph, original: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return group name -> width: that in ``original`` if there is one, else the present one."""
    return {group.name: (original or {}).get(group.name, group.width) for group in graph.groups}
