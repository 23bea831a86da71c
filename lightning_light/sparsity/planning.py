"""Plan a pruning run: which weights, whether the budget can be met, and the masks of each event."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_light.errors import BudgetError, TargetError
from lightning_light.sparsity.options import WeightPruningOptions
from lightning_light.sparsity.patterns import NM, Pattern, Unstructured
from lightning_light.sparsity.scope import Scope, apportion, erk_densities, lowest, select_globally
from lightning_light.sparsity.scores import check_evidence
from lightning_light.sparsity.weights import MaskableWeight, find_weights
from lightning_light.targets import as_targets

__all__ = ["PruningPlan", "check_existing_masks", "plan_pruning"]


@dataclass(frozen=True, eq=False)
class PruningPlan:
    """The weights of a run and the sparsity that each has to reach.

    Attributes:
        options: pattern, scope, budget.
        weights: those that may be masked.
        own_sparsity: weight name -> its final sparsity, for layers that ``remaining`` names.
    """

    options: WeightPruningOptions
    weights: Sequence[MaskableWeight]
    own_sparsity: Mapping[str, float]

    def masks(
        self, scores: Mapping[str, Tensor], fraction: float, current: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Select the masks at ``fraction`` of the way to the budget.

        Args:
            scores: weight name -> scores as ``(out, in, *kernel)``; the lowest are masked first.
            fraction: in [0, 1], from a schedule.
            current: the masks so far; what they mask stays masked.

        Returns:
            Weight name -> mask in the weight's own layout, True where a weight remains.
        """
        current, scores = current or {}, dict(scores)
        for weight in self.weights:
            if weight.name in current:
                scores[weight.name] = _without(weight.oriented(current[weight.name]), scores[weight.name])
        pattern = self.options.pattern
        if isinstance(pattern, NM):
            selected = {name: pattern.mask(score, pattern.kept_at(fraction)) for name, score in scores.items()}
        else:
            selected = self._by_units(scores, fraction, current)
        masks = {}
        for weight in self.weights:
            mask = weight.oriented(selected[weight.name]).clone(memory_format=torch.contiguous_format)
            _keep_norms(weight, mask, scores[weight.name])
            masks[weight.name] = mask & current[weight.name].to(mask.device) if weight.name in current else mask
        return masks

    def _by_units(
        self, scores: Mapping[str, Tensor], fraction: float, current: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        pattern = self.options.pattern
        units = {weight.name: _pooled(pattern, scores[weight.name], weight.name in current) for weight in self.weights}
        free = [weight for weight in self.weights if weight.name not in self.own_sparsity]
        masked = {
            name: lowest(units[name], _count(units[name], fraction * sparsity))
            for name, sparsity in self.own_sparsity.items()
        }
        sparsity = self.options.sparsity_at(fraction)
        masked |= _select(free, {weight.name: units[weight.name] for weight in free}, self.options.scope, sparsity)
        return {name: ~pattern.expand(masked[name], scores[name].shape) for name in units}


def plan_pruning(
    method: str, model: nn.Module, options: WeightPruningOptions, left_alone: Sequence[str] = ()
) -> PruningPlan:
    """Find the weights and check the whole run: pattern, evidence, budget. ``model`` is not changed.

    Args:
        method: the name of the callback or function, for error messages.
        model: any module.
        options: pattern, scope, budget.
        left_alone: modules whose weights are not masked.

    Raises:
        TargetError: the targets match nothing, or a layer that the pattern does not divide.
        UnsupportedError: evidence that a layer cannot give.
        BudgetError: the budget leaves a layer without a unit.
    """
    weights = find_weights(model, as_targets(options.targets), method, left_alone)
    if "inputs" in options.criterion.needs:  # what code of the network itself multiplies with, no hook can read
        weights = [weight for weight in weights if weight.layer] or weights
    _check_pattern(method, weights, options.pattern)
    check_evidence(method, options.criterion, weights)
    own: dict[str, float] = {}
    for pattern, remaining in (options.remaining or {}).items():
        layers = as_targets(pattern).select(model)
        own |= {weight.name: 1.0 - remaining for weight in weights if weight.layer in layers}
    plan = PruningPlan(options, weights, own)
    _check_budget(method, plan)
    return plan


def check_existing_masks(method: str, plan: PruningPlan, masks: Mapping[str, Tensor]) -> None:
    """Refuse a budget below the sparsity of masks from an earlier run, which a rising schedule never lifts.

    Raises:
        BudgetError: states both sparsities.
    """
    if isinstance(plan.options.pattern, NM):
        return
    found = {weight: masks[weight.name] for weight in plan.weights if weight.name in masks}
    free = {weight: mask for weight, mask in found.items() if weight.name not in plan.own_sparsity}
    total = sum(weight.parameter.numel() for weight in plan.weights if weight.name not in plan.own_sparsity)
    _refuse_lower(method, "the targets", free, total, plan.options.sparsity_at(1.0), plan.options.pattern)
    for weight, mask in found.items():
        if weight.name in plan.own_sparsity:
            own = plan.own_sparsity[weight.name]
            _refuse_lower(method, f"`{weight.layer}`", {weight: mask}, mask.numel(), own, plan.options.pattern)


def _refuse_lower(
    method: str, what: str, masks: Mapping[MaskableWeight, Tensor], total: int, sparsity: float, pattern: Pattern
) -> None:
    masked = sum(int((~mask).sum()) for mask in masks.values())
    slack = sum(_unit_size(weight, pattern) for weight in masks)  # rounding to whole units, per weight
    if masked > round(sparsity * total) + slack:
        raise BudgetError(
            f"`{method}` with a sparsity of {sparsity:.4g}: expected at least the sparsity of the masks from an "
            f"earlier run, found {masked / total:.4g} in {what}. A rising schedule does not lift masks: give a "
            "higher sparsity, use `Alternating()`, which selects new masks, or start from the dense network."
        )


def _check_pattern(method: str, weights: Sequence[MaskableWeight], pattern: Pattern) -> None:
    reasons = {weight.layer: reason for weight in weights if (reason := _unfit(weight, pattern)) is not None}
    if reasons:
        layer, reason = next(iter(reasons.items()))
        raise TargetError(
            f"`{method}(pattern={pattern!r})` on `{layer}`: expected {reason}. Exclude the layers that do not fit: "
            f"`targets=Targets(exclude={list(reasons)})`."
        )


def _unfit(weight: MaskableWeight, pattern: Pattern) -> str | None:
    """Return what kind of weight the pattern expects, if this is another."""
    if "weight" not in weight.source.tensor and not isinstance(pattern, Unstructured):
        return f"a layer of torch, whose layout is known, or `Unstructured()`; `{weight.name}` has a layout of its own"
    if weight.source.norm == "weight norm" and not isinstance(pattern, Unstructured | NM):
        return "a plain weight: under weight norm a filter without weights would be divided by zero"
    return pattern.incompatibility(weight.oriented(weight.parameter).shape)


def _keep_norms(weight: MaskableWeight, mask: Tensor, scores: Tensor) -> None:
    """Keep the best element of what weight norm divides by a norm, where all of it would be masked; in place."""
    dim = weight.source.dim
    if weight.source.norm != "weight norm" or dim is None:
        return
    rows = mask.movedim(dim, 0)
    best = weight.oriented(scores).movedim(dim, 0).flatten(1).argmax(1)
    for row in (~rows.flatten(1).any(1)).nonzero().flatten().tolist():
        rows[row][torch.unravel_index(best[row], rows.shape[1:])] = True


def _check_budget(method: str, plan: PruningPlan) -> None:
    """Every weight keeps at least one unit; with a scope of one layer that is a matter of rounding."""
    options = plan.options
    free = [weight for weight in plan.weights if weight.name not in plan.own_sparsity]
    if isinstance(options.pattern, NM) or options.scope == "local" or not free:
        return
    sizes = [_unit_size(weight, options.pattern) for weight in free]
    total = sum(weight.parameter.numel() for weight in free)
    limit, masked = total - sum(sizes), round(options.sparsity_at(1.0) * total)
    if masked > limit:
        raise BudgetError(
            f"`{method}({options.budget!r})`: expected at most {limit} of {total} weights to be masked, so that each "
            f"of {len(free)} layers keeps one unit of `{options.pattern!r}`, found a budget of {masked}. Lower the "
            f"sparsity to {limit / total:.4g}, or take fewer targets."
        )


def _unit_size(weight: MaskableWeight, pattern: Pattern) -> int:
    """Weights per unit, from the shape alone."""
    shape = weight.oriented(weight.parameter).shape
    return shape.numel() // pattern.pool(torch.empty(shape, device="meta")).numel()


def _without(mask: Tensor, scores: Tensor) -> Tensor:
    """``scores`` with the lowest possible score where ``mask`` is False."""
    return torch.where(mask.to(scores.device), scores, -torch.inf)


def _pooled(pattern: Pattern, scores: Tensor, masked: bool) -> Tensor:
    """Scores per unit. A unit is masked already, and has ``-inf``, where all its weights are."""
    if not masked:
        return pattern.pool(scores)
    remains = scores != -torch.inf
    units = pattern.pool(torch.where(remains, scores, 0.0))
    return torch.where(pattern.pool(remains.to(units.dtype)) > 0.0, units, -torch.inf)


def _count(units: Tensor, sparsity: float) -> int:
    """Number of units of one weight to mask: at least those masked already, and never all."""
    already = int((units == -torch.inf).sum())
    return max(already, min(round(sparsity * units.numel()), units.numel() - 1))


def _select(
    weights: Sequence[MaskableWeight], units: Mapping[str, Tensor], scope: Scope, sparsity: float
) -> dict[str, Tensor]:
    """Mark the units to mask, by weight name."""
    if not weights or scope == "local":
        return {name: lowest(found, _count(found, sparsity)) for name, found in units.items()}
    numbers = [weight.parameter.numel() for weight in weights]
    sizes = [number // found.numel() for number, found in zip(numbers, units.values(), strict=True)]
    masked = round(sparsity * sum(numbers))
    if scope in ("global", "lamp"):
        chosen = select_globally(list(units.values()), sizes, masked, lamp=scope == "lamp")
        return dict(zip(units, chosen, strict=True))
    densities = erk_densities([weight.oriented(weight.parameter).shape for weight in weights], sparsity)
    wanted = [(1.0 - density) * found.numel() for density, found in zip(densities, units.values(), strict=True)]
    limits = [found.numel() - 1 for found in units.values()]
    if set(sizes) == {1}:
        counts = apportion(wanted, limits, masked)
    else:
        counts = [min(round(value), limit) for value, limit in zip(wanted, limits, strict=True)]
    already = [int((found == -torch.inf).sum()) for found in units.values()]
    numbered = zip(units.items(), counts, already, strict=True)
    return {name: lowest(found, max(count, had)) for (name, found), count, had in numbered}
