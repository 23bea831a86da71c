"""How many units each weight loses, and which: within each weight, or among all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_light.criteria.reduction import normalize
from lightning_light.errors import BudgetError

__all__ = ["Scope", "apportion", "check_scope", "erk_densities", "lowest", "select_among_all"]

Scope: TypeAlias = Literal["local", "global", "erk", "lamp"]


def check_scope(method: str, scope: str) -> None:
    """Refuse an unknown name.

    Raises:
        ValueError: ``scope`` is not one of `Scope`.
    """
    if scope not in get_args(Scope):
        raise ValueError(f"`{method}(scope={scope!r})`: expected one of {', '.join(map(repr, get_args(Scope)))}.")


def lowest(scores: Tensor, count: int) -> Tensor:
    """A mask of exactly ``count`` entries with the lowest scores; of equal ones the first.

    >>> lowest(torch.tensor([3.0, 1.0, 1.0, 2.0]), 1)
    tensor([False,  True, False, False])
    """
    flat = scores.reshape(-1)
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = torch.where(flat.isnan(), torch.inf, flat)
    threshold = flat.kthvalue(min(count, flat.numel())).values
    chosen = flat < threshold
    equal = (flat == threshold).nonzero().reshape(-1)
    chosen[equal[: count - int(chosen.sum())]] = True
    return chosen.reshape(scores.shape)


def erk_densities(shapes: Sequence[torch.Size], amount: float) -> list[float]:
    """Share of each weight that stays, by the Erdős–Rényi kernel rule; the total of zeros is ``amount``.

    ``density = epsilon * (out + in + sum(kernel)) / (out * in * prod(kernel))``, at most 1: small layers stay dense.
    Mocanu et al., 2018, https://arxiv.org/abs/1707.04780; with kernels: Evci et al., 2020,
    https://arxiv.org/abs/1911.11134.
    """
    sizes, raw = [shape.numel() for shape in shapes], [sum(shape) / shape.numel() for shape in shapes]
    dense: set[int] = set()
    while len(dense) < len(sizes):
        free = [place for place in range(len(sizes)) if place not in dense]
        left = (1.0 - amount) * sum(sizes) - sum(sizes[place] for place in dense)
        epsilon = left / sum(raw[place] * sizes[place] for place in free)
        over = {place for place in free if epsilon * raw[place] > 1.0}
        if not over:
            return [1.0 if place in dense else max(epsilon * raw[place], 0.0) for place in range(len(sizes))]
        dense |= over
    return [1.0] * len(sizes)


def apportion(wanted: Sequence[float], limits: Sequence[int], total: int) -> list[int]:
    """Integers near ``wanted``, each at most its limit, whose sum is ``total``; the largest remainders are rounded up.

    >>> apportion([1.4, 2.4, 3.2], [9, 9, 9], 7)
    [2, 2, 3]
    """
    counts = [min(int(value), limit) for value, limit in zip(wanted, limits, strict=True)]
    while (missing := total - sum(counts)) != 0:
        step = 1 if missing > 0 else -1
        room = [p for p in range(len(counts)) if (counts[p] < limits[p] if step > 0 else counts[p] > 0)]
        if not room:
            break
        room.sort(key=lambda place: (step * (counts[place] - wanted[place]), place))
        for place in room[: abs(missing)]:
            counts[place] += step
    return counts


def select_among_all(units: Sequence[Tensor], sizes: Sequence[int], zeros: int, *, lamp: bool) -> list[Tensor]:
    """Masks of the units that go: the lowest of all, ``zeros`` weights in total. Every weight keeps its best unit.

    Args:
        units: the scores of each weight's units; what must go has ``-inf``.
        sizes: weights a unit.
        zeros: weights to go, of all; where units have several sizes, as near as they allow from below.
        lamp: compare scores relative to what is left of their own weight.

    Raises:
        BudgetError: fewer weights are left than one unit each.
    """
    room = sum((scores.numel() - 1) * size for scores, size in zip(units, sizes, strict=True))
    if zeros > room:
        raise BudgetError(
            f"Expected at most {room} zeros, so that each of {len(units)} weights keeps a unit, found a budget of "
            f"{zeros}. Lower the amount, or take fewer targets."
        )
    flat = [_protected(scores.reshape(-1).float(), lamp=lamp) for scores in units]
    together = torch.cat(flat)
    if len(set(sizes)) == 1:
        chosen = lowest(together, zeros // sizes[0])
    else:
        weights = torch.cat([torch.full((len(scores),), size) for scores, size in zip(flat, sizes, strict=True)])
        order = together.argsort(stable=True)
        behind = weights.to(order.device)[order].cumsum(0)
        chosen = torch.zeros_like(together, dtype=torch.bool)
        chosen[order[behind <= zeros]] = True
    parts = torch.split(chosen, [len(scores) for scores in flat])
    return [part.reshape(scores.shape) for part, scores in zip(parts, units, strict=True)]


def _protected(scores: Tensor, *, lamp: bool) -> Tensor:
    gone = scores == -torch.inf
    if lamp:
        scores = torch.where(gone, scores, normalize(torch.where(gone, torch.zeros_like(scores), scores), "lamp"))
    scores = scores.clone()
    scores[torch.where(scores.isnan(), torch.inf, scores).argmax()] = torch.inf
    return scores
