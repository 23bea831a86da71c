"""Decide for all weights together what stays: scores in, masks out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_light.errors import BudgetError, TargetError
from lightning_light.sparsity.patterns import NM, Pattern
from lightning_light.sparsity.scope import Scope, apportion, erk_densities, lowest, select_among_all
from lightning_light.sparsity.weights import Weight

__all__ = ["check_pattern", "plan_masks"]


def check_pattern(method: str, weights: Sequence[Weight], pattern: Pattern) -> None:
    """Refuse weights that do not divide into the pattern's units.

    Raises:
        TargetError: names the layers and how to leave them out.
    """
    complaints = {
        weight.layer: incompatibility
        for weight in weights
        if (incompatibility := pattern.incompatibility(weight.facing(weight.parameter).shape)) is not None
    }
    if complaints:
        layer, incompatibility = next(iter(complaints.items()))
        raise TargetError(
            f"`{method}(pattern={pattern!r})` on `{layer}`: expected {incompatibility}. Exclude what does not fit: "
            f"`targets=Targets(exclude={list(complaints)})`."
        )


def plan_masks(
    weights: Sequence[Weight],
    scores: Mapping[str, Tensor],
    *,
    pattern: Pattern,
    scope: Scope,
    amount: float,
    share: float,
    amounts: Mapping[str, float],
    current: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Masks by weight name, True where a weight stays. What ``current`` masks stays masked.

    Args:
        weights: those to decide on.
        scores: by weight name, in the weight's own layout; the lowest goes first.
        pattern: what goes together.
        scope: how ``amount`` is divided among the weights.
        amount: zeros of all weights that ``amounts`` does not name, in [0, 1]; `NM` has its own.
        share: of the way to the budget that is behind; for `NM`.
        amounts: weight name -> its own share of zeros.
        current: masks so far.

    Raises:
        BudgetError: a weight would lose everything.
    """
    masks: dict[str, Tensor] = {}
    free = [weight for weight in weights if weight.name not in amounts]
    for weight in weights if isinstance(pattern, NM) else ():
        assert isinstance(pattern, NM)  # what the loop is for
        facing = weight.facing(_left(scores[weight.name], current.get(weight.name)))
        masks[weight.name] = weight.facing(pattern.mask(facing, pattern.kept_of(share)))
    if not masks:
        own = [weight for weight in weights if weight.name in amounts]
        units = {weight.name: _units(weight, scores, pattern, current) for weight in weights}
        for weight in own:
            found = units[weight.name]
            gone = lowest(found, _count(found, amounts[weight.name]))
            masks[weight.name] = _mask(weight, gone, pattern)
        for weight, gone in zip(free, _select(free, [units[w.name] for w in free], scope, amount), strict=True):
            masks[weight.name] = _mask(weight, gone, pattern)
    for name, mask in masks.items():
        if name in current:
            mask &= current[name].to(mask.device)
    return {weight.name: masks[weight.name] for weight in weights}


def _left(scores: Tensor, mask: Tensor | None) -> Tensor:
    return scores if mask is None else torch.where(mask.to(scores.device), scores, -torch.inf)


def _units(weight: Weight, scores: Mapping[str, Tensor], pattern: Pattern, current: Mapping[str, Tensor]) -> Tensor:
    pooled = pattern.pool(weight.facing(scores[weight.name]))
    if weight.name not in current:
        return pooled
    left = weight.facing(current[weight.name].to(pooled.device, torch.float32))
    return torch.where(pattern.pool(left) > 0.0, pooled, -torch.inf)


def _mask(weight: Weight, gone: Tensor, pattern: Pattern) -> Tensor:
    shape = weight.facing(weight.parameter).shape
    return weight.facing(~pattern.expand(gone, shape)).clone(memory_format=torch.contiguous_format)


def _count(units: Tensor, amount: float) -> int:
    """How many units of one weight go: at least what has gone already, and never all."""
    already = int((units == -torch.inf).sum())
    return max(already, min(round(amount * units.numel()), units.numel() - 1))


def _select(weights: Sequence[Weight], units: Sequence[Tensor], scope: Scope, amount: float) -> list[Tensor]:
    if not weights:
        return []
    if scope == "local":
        return [lowest(found, _count(found, amount)) for found in units]
    totals = [weight.parameter.numel() for weight in weights]
    sizes = [total // found.numel() for total, found in zip(totals, units, strict=True)]
    zeros = round(amount * sum(totals))
    if scope in ("global", "lamp"):
        return select_among_all(units, sizes, zeros, lamp=scope == "lamp")
    densities = erk_densities([weight.facing(weight.parameter).shape for weight in weights], amount)
    wanted = [(1.0 - density) * found.numel() for density, found in zip(densities, units, strict=True)]
    limits = [found.numel() - 1 for found in units]
    if set(sizes) == {1}:
        counts = apportion(wanted, limits, zeros)
        if sum(counts) != zeros:
            raise BudgetError(
                f"Expected at most {sum(limits)} zeros, so that each of {len(weights)} weights keeps one, found a "
                f"budget of {zeros}. Lower the amount, or take fewer targets."
            )
    else:
        counts = [min(round(value), limit) for value, limit in zip(wanted, limits, strict=True)]
    already = [int((found == -torch.inf).sum()) for found in units]
    return [lowest(found, max(n, had)) for found, n, had in zip(units, counts, already, strict=True)]
