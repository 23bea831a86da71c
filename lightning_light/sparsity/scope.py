"""Distribute a sparsity over the weights of a network, and select the units to mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_light.criteria.reduction import normalize

__all__ = ["Scope", "apportion", "erk_densities", "lowest", "select_globally"]

Scope: TypeAlias = Literal["local", "global", "erk", "lamp"]


def lowest(scores: Tensor, count: int) -> Tensor:
    """Mark exactly ``count`` entries with the lowest scores; of equal scores the first.

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


def erk_densities(shapes: Sequence[torch.Size], sparsity: float) -> list[float]:
    """Compute the density of each weight by the Erdős–Rényi kernel rule, for a total sparsity of ``sparsity``.

    ``density = epsilon * (out + in + sum(kernel)) / (out * in * prod(kernel))``, at most 1: small layers stay dense.
    Mocanu et al., 2018, https://arxiv.org/abs/1707.04780; with kernels: Evci et al., 2020,
    https://arxiv.org/abs/1911.11134.
    """
    sizes, raw = [shape.numel() for shape in shapes], [sum(shape) / shape.numel() for shape in shapes]
    dense: set[int] = set()
    while len(dense) < len(sizes):
        free = [index for index in range(len(sizes)) if index not in dense]
        remaining = (1.0 - sparsity) * sum(sizes) - sum(sizes[index] for index in dense)
        epsilon = remaining / sum(raw[index] * sizes[index] for index in free)
        over = {index for index in free if epsilon * raw[index] > 1.0}
        if not over:
            return [1.0 if index in dense else max(epsilon * raw[index], 0.0) for index in range(len(sizes))]
        dense |= over
    return [1.0] * len(sizes)


def apportion(wanted: Sequence[float], limits: Sequence[int], total: int) -> list[int]:
    """Round ``wanted`` to integers, each at most its limit, whose sum is ``total``; largest remainders are rounded up.

    >>> apportion([1.4, 2.4, 3.2], [9, 9, 9], 7)
    [2, 2, 3]
    """
    counts = [min(int(value), limit) for value, limit in zip(wanted, limits, strict=True)]
    while (missing := total - sum(counts)) != 0:
        step = 1 if missing > 0 else -1
        free = [p for p in range(len(counts)) if (counts[p] < limits[p] if step > 0 else counts[p] > 0)]
        if not free:
            break
        free.sort(key=lambda index: (step * (counts[index] - wanted[index]), index))
        for index in free[: abs(missing)]:
            counts[index] += step
    return counts


def select_globally(units: Sequence[Tensor], sizes: Sequence[int], masked: int, *, lamp: bool) -> list[Tensor]:
    """Select the units with the lowest scores of all weights, ``masked`` weights in total.

    Every weight keeps its best unit.

    Args:
        units: the scores of each weight's units; ``-inf`` where a unit is masked already.
        sizes: weights per unit.
        masked: number of weights to mask; where units have several sizes, as near as they allow from below.
        lamp: compare scores relative to the scores that remain in their own weight.
    """
    flat = [_protected(scores.reshape(-1).float(), lamp=lamp) for scores in units]
    together = torch.cat(flat)
    if len(set(sizes)) == 1:
        chosen = lowest(together, masked // sizes[0])
    else:
        weights = torch.cat([torch.full((len(scores),), size) for scores, size in zip(flat, sizes, strict=True)])
        order = together.argsort(stable=True)
        cumulative = weights.to(order.device)[order].cumsum(0)
        chosen = torch.zeros_like(together, dtype=torch.bool)
        chosen[order[cumulative <= masked]] = True
    parts = torch.split(chosen, [len(scores) for scores in flat])
    return [part.reshape(scores.shape) for part, scores in zip(parts, units, strict=True)]


def _protected(scores: Tensor, *, lamp: bool) -> Tensor:
    masked = scores == -torch.inf
    if lamp:
        scores = torch.where(masked, scores, normalize(torch.where(masked, torch.zeros_like(scores), scores), "lamp"))
    scores = scores.clone()
    scores[torch.where(scores.isnan(), torch.inf, scores).argmax()] = torch.inf
    return scores
