"""Plans: which channels leave at one event. Pure: the model is read, nothing is written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_light.budgets import Budget
from lightning_light.criteria.evidence import Criterion
from lightning_light.criteria.reduction import Normalizer, Reduction
from lightning_light.dependency import ChannelGroup, DependencyGraph
from lightning_light.errors import BudgetError
from lightning_light.example_input import ExampleInput
from lightning_light.structured.costs import Estimator, smallest
from lightning_light.structured.ranking import Ranking, removal_order
from lightning_light.structured.scores import Gathered, score_groups
from lightning_light.targets import Targets

__all__ = ["Options", "Plan", "plan_channels"]

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Options:
    """How channels are chosen; every default stands at the callback.

    Attributes:
        criterion: scores weights.
        ranking: among which channels the lowest score is looked for.
        targets: layers whose output channels may leave.
        amounts: layer pattern -> share of its channels that leaves in the end, in [0, 1); such layers are not
            ranked.
        round_to: widths stay multiples of it, unless the layer was narrower.
        min_channels: what every layer keeps.
        max_amount: no layer loses more than this share of the channels that it once had, in [0, 1].
        reduction: how the scores of a group's tensors become one.
        normalizer: how the groups' scores are made comparable.
    """

    criterion: Criterion
    ranking: Ranking
    targets: Targets
    amounts: Mapping[str, float]
    round_to: int
    min_channels: int
    max_amount: float
    reduction: Reduction
    normalizer: Normalizer | None


@dataclass(frozen=True)
class Plan:
    """What leaves.

    Attributes:
        kept: group name -> boolean mask of the channels that stay, shape ``(width,)``.
        before: the budget's quantity now.
        after: the same after the cut, counted; equal to ``before`` where only ``amounts`` were given.
        skipped: group name -> why its channels stay.
    """

    kept: dict[str, Tensor] = field(default_factory=dict)
    before: float = 0.0
    after: float = 0.0
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def removed(self) -> int:
        """How many channels leave."""
        return sum(int((~mask).sum()) for mask in self.kept.values())

    def cuts(self) -> list[str]:
        """One line for each layer that loses channels."""
        return [
            f"{name}: {mask.numel()} -> {int(mask.sum())} channels"
            for name, mask in self.kept.items()
            if not mask.all()
        ]

    def lines(self) -> list[str]:
        """One line a layer: what leaves, and why the others stay."""
        return self.cuts() + [f"{name}: stays, {reason}" for name, reason in self.skipped.items()]


def plan_channels(
    model: nn.Module,
    graph: DependencyGraph,
    options: Options,
    *,
    budget: Budget | None,
    limit: float,
    share: float,
    original: Mapping[str, int],
    example: ExampleInput,
    gathered: Gathered,
    generator: torch.Generator | None = None,
) -> Plan:
    """Choose the fewest channels, least important first, whose removal brings the budget's quantity to ``limit``.

    Args:
        model: read only.
        graph: of ``model`` as it stands.
        options: how to choose.
        budget: names the quantity; None where only ``options.amounts`` say what leaves.
        limit: the quantity may be at most this.
        share: of the way to ``options.amounts``, in [0, 1].
        original: group name -> width before the first cut.
        example: one call of ``model``.
        gathered: what data-dependent criteria need.
        generator: for criteria that draw.

    Raises:
        BudgetError: even with every layer at its floor the quantity is above ``limit``.
        TargetError: ``options.targets`` match nothing.
    """
    free, skipped = _candidates(model, graph, options.targets)
    if not free:
        return Plan(skipped=skipped)
    scores = score_groups(
        model,
        free,
        options.criterion,
        gathered=gathered,
        reduction=options.reduction,
        normalizer=options.normalizer,
        generator=generator,
    )
    floors, steps = _floors(free, options, original)
    amounts = _layer_amounts(model, options.amounts)
    widths = {
        g.name: _width_by_amount(original[g.name], share * amounts[layer], floors[g.name], steps[g.name], g.width)
        for g in free
        if (layer := g.name.partition("#")[0]) in amounts
    }
    ranked = [group for group in free if group.name not in widths]
    kept = {name: _mask(scores[name], width) for name, width in widths.items()}
    if budget is None or not ranked:
        return Plan(kept, skipped=skipped)
    estimator = Estimator(model, graph, free, budget, example)
    search = _Search(ranked, scores, options, original, floors, steps, kept, estimator, model)
    chosen, value = search.solve(limit, budget)
    return Plan(chosen, estimator.now, value, skipped)


class _Search:
    """The removal order, and how far to go down it."""

    def __init__(
        self,
        ranked: Sequence[ChannelGroup],
        scores: Mapping[str, Tensor],
        options: Options,
        original: Mapping[str, int],
        floors: Mapping[str, int],
        steps: Mapping[str, int],
        fixed: Mapping[str, Tensor],
        estimator: Estimator,
        model: nn.Module,
    ) -> None:
        scopes = [options.ranking.scope(group, model) for group in ranked]
        self._order, _ = removal_order(ranked, scores, scopes, original)
        self._ranked, self._scores, self._fixed, self._estimator = ranked, scores, dict(fixed), estimator
        self._now = torch.tensor([group.width for group in ranked])
        self._floor = torch.tensor([floors[group.name] for group in ranked])
        self._step = torch.tensor([steps[group.name] for group in ranked])
        self._names = [group.name for group in estimator.groups]

    def solve(self, limit: float, budget: Budget) -> tuple[dict[str, Tensor], float]:
        """Masks for the fewest removals that reach ``limit``, and the quantity they leave, counted."""
        total, slack = self._order.numel(), 1.0 + _ROUNDING
        if self._estimate(0) <= limit * slack:
            return self.masks(0), self._estimate(0)
        least = self._estimator.exact(self.masks(total))
        if least > limit * slack:
            raise BudgetError(
                f"`{budget!r}` is out of reach: expected {budget.quantity} <= {limit:.6g}, but with every layer at its "
                f"floor {least:.6g} remain of {self._estimator.now:.6g}. Lower `min_channels` or `round_to`, raise "
                "`max_amount`, widen `targets`, or ask for less."
            )
        guess = smallest(lambda n: self._estimate(n) <= limit * slack, 0, total)
        return self._corrected(guess, total, limit * slack)

    def masks(self, count: int) -> dict[str, Tensor]:
        """Group name -> channels that stay, when the first ``count`` of the order leave."""
        widths = self._widths(count).tolist()
        mine = {g.name: _mask(self._scores[g.name], width) for g, width in zip(self._ranked, widths, strict=True)}
        return {**self._fixed, **mine}

    def _widths(self, count: int) -> Tensor:
        gone = torch.bincount(self._order[:count], minlength=len(self._ranked))
        stays = torch.maximum(self._now - gone, self._floor)
        return torch.minimum((stays + self._step - 1) // self._step * self._step, self._now)

    def _estimate(self, count: int) -> float:
        widths = dict(zip((group.name for group in self._ranked), self._widths(count).tolist(), strict=True))
        widths |= {name: int(mask.sum()) for name, mask in self._fixed.items()}
        return self._estimator(torch.tensor([widths[name] for name in self._names]))

    def _corrected(self, guess: int, total: int, limit: float) -> tuple[dict[str, Tensor], float]:
        """Where the estimate was off (work without weights, measured time), go on by counting."""
        values: dict[int, float] = {}

        def fits(count: int) -> bool:
            values[count] = self._estimator.exact(self.masks(count))
            return values[count] <= limit

        stride = max(1, total // 64)
        if fits(guess):
            if math.isclose(values[guess], self._estimate(guess), rel_tol=1e-6):
                return self.masks(guess), values[guess]
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
        return self.masks(best), values[best]


def _candidates(
    model: nn.Module, graph: DependencyGraph, targets: Targets
) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Groups that may lose channels, and why each other may not."""
    chosen = set(targets.select(model))
    free, skipped = [], {}
    for group in graph.groups:
        makers = {
            m.tensor.partition(".parametrizations.")[0]
            if ".parametrizations." in m.tensor
            else m.tensor.rpartition(".")[0]
            for m in group.members
            if m.role == "out"
        }
        if not makers:
            continue
        if group.reason is not None:
            skipped[group.name] = group.reason
        elif makers - chosen:
            skipped[group.name] = f"`targets` do not name {', '.join(sorted(makers - chosen)[:3])}"
        elif group.width < 2:
            skipped[group.name] = "it has one channel left"
        else:
            free.append(group)
    return free, skipped


def _floors(
    groups: Sequence[ChannelGroup], options: Options, original: Mapping[str, int]
) -> tuple[dict[str, int], dict[str, int]]:
    """Fewest channels, and the step between widths, of each group."""
    floors, steps = {}, {}
    for group in groups:
        positions = next((m.index.shape[1] for m in group.members if m.role == "out"), 1)
        steps[group.name] = options.round_to // math.gcd(options.round_to, positions)
        least = math.ceil(original[group.name] * (1.0 - options.max_amount) - _ROUNDING)
        wanted = max(1, math.ceil(options.min_channels / positions), least)
        floors[group.name] = min(group.width, wanted)
    return floors, steps


def _layer_amounts(model: nn.Module, amounts: Mapping[str, float]) -> dict[str, float]:
    """Layer name -> share of its channels that leaves in the end; later patterns win."""
    return {name: amount for pattern, amount in amounts.items() for name in Targets(pattern).select(model)}


def _width_by_amount(once: int, amount: float, floor: int, step: int, now: int) -> int:
    wanted = max(floor, round(once * (1.0 - amount)))
    return min(now, math.ceil(wanted / step) * step)


def _mask(scores: Tensor, width: int) -> Tensor:
    mask = torch.ones(scores.numel(), dtype=torch.bool)
    mask[torch.argsort(scores, stable=True)[: scores.numel() - width]] = False
    return mask
