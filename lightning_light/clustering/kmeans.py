"""One-dimensional k-means: the centroids of a layer's weights, or of each of its output channels."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["Initialization", "assign", "kmeans"]

Initialization = Literal["linear", "density"]


def kmeans(
    values: Tensor, clusters: int, *, initialization: Initialization, zero_centroid: bool, iterations: int = 30
) -> tuple[Tensor, Tensor]:
    """Run Lloyd's algorithm on each row of ``values``; deterministic.

    Han et al., 2016, "Deep Compression", section 3, finds ``"linear"`` the best start: large weights are few, and
    matter. https://arxiv.org/abs/1510.00149

    Args:
        values: ``(rows, n)``.
        clusters: number of centroids per row, at least 2.
        initialization: ``"linear"``, evenly from the least to the greatest value; ``"density"``, at even quantiles.
        zero_centroid: the first centroid is zero, and exactly the zeros are assigned to it.
        iterations: at most.

    Returns:
        Centroids ``(rows, clusters)`` in their initial order, and the index of each value's centroid, ``(rows, n)``.

    Example:
        >>> values = torch.tensor([[0.9, 1.1, 5.0]])
        >>> centroids, assignments = kmeans(values, 2, initialization="linear", zero_centroid=False)
        >>> centroids.tolist(), assignments.tolist()
        ([[1.0, 5.0]], [[0, 0, 1]])
    """
    exact = values.double()
    free = exact != 0.0 if zero_centroid else torch.ones_like(exact, dtype=torch.bool)
    centroids = _start(exact, free, clusters - zero_centroid, initialization)
    for _ in range(iterations):
        moved = _means(exact, free, _nearest(exact, centroids), centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    if zero_centroid:
        centroids = torch.cat([torch.zeros_like(centroids[:, :1]), centroids], dim=1)
    centroids = centroids.to(values.dtype)
    return centroids, assign(values, centroids, free=free, zero_centroid=zero_centroid)


def assign(values: Tensor, centroids: Tensor, *, free: Tensor, zero_centroid: bool) -> Tensor:
    """Return the index of each value's nearest centroid; values that are not ``free`` have the zero centroid."""
    if not zero_centroid:
        return _nearest(values.double(), centroids.double())
    assignments = _nearest(values.double(), centroids[:, 1:].double()) + 1
    return torch.where(free, assignments, 0)


def _start(values: Tensor, free: Tensor, clusters: int, initialization: Initialization) -> Tensor:
    steps = torch.linspace(0.0, 1.0, clusters, dtype=values.dtype, device=values.device)
    if initialization == "linear":
        low = values.masked_fill(~free, float("inf")).amin(1, keepdim=True)
        high = values.masked_fill(~free, float("-inf")).amax(1, keepdim=True)
        centroids = low + (high - low) * steps
    else:
        rows = [row[mask].sort().values for row, mask in zip(values, free, strict=True)]
        levels = (steps - 0.5 / clusters + steps.flip(0) * (1.0 / clusters)).clamp(0.0, 1.0)
        centroids = torch.stack([_quantiles(row, levels) for row in rows])
    return torch.where(torch.isfinite(centroids), centroids, 0.0)


def _quantiles(ascending: Tensor, levels: Tensor) -> Tensor:
    if not len(ascending):
        return torch.zeros_like(levels)
    return ascending[(levels * (len(ascending) - 1)).round().long()]


def _nearest(values: Tensor, centroids: Tensor) -> Tensor:
    ordered, order = centroids.sort(dim=1)
    boundaries = (ordered[:, 1:] + ordered[:, :-1]) / 2
    return order.gather(1, torch.searchsorted(boundaries.contiguous(), values.contiguous()))


def _means(values: Tensor, free: Tensor, assignments: Tensor, centroids: Tensor) -> Tensor:
    weights = free.to(values.dtype)
    sums = torch.zeros_like(centroids).scatter_add_(1, assignments, values * weights)
    counts = torch.zeros_like(centroids).scatter_add_(1, assignments, weights)
    return torch.where(counts > 0, sums / counts.clamp_min(1.0), centroids)
