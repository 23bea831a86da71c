"""k-means of numbers: which few values stand for all weights of a layer, or of each of its channels."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["Initialization", "assign", "cluster"]

Initialization = Literal["linear", "density"]


def cluster(
    values: Tensor, clusters: int, *, initialization: Initialization, zeros: bool, sweeps: int = 30
) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm on each row of ``values``; the same answer at every call.

    Han et al., 2016, "Deep Compression", section 3, finds ``"linear"`` the best start: large weights are few, and
    matter. https://arxiv.org/abs/1510.00149

    Args:
        values: ``(rows, n)``.
        clusters: how many values a row may have in the end, at least 2.
        initialization: ``"linear"``, evenly from the least to the greatest; ``"density"``, at even quantiles.
        zeros: what is exactly zero keeps the first centroid, which stays zero, and no other weight gets it.
        sweeps: at most.

    Returns:
        Centroids ``(rows, clusters)`` in the order of the first sweep, and to which each value belongs, ``(rows, n)``.

    Example:
        >>> centroids, places = cluster(torch.tensor([[0.9, 1.1, 5.0]]), 2, initialization="linear", zeros=False)
        >>> centroids.tolist(), places.tolist()
        ([[1.0, 5.0]], [[0, 0, 1]])
    """
    exact = values.double()
    free = exact != 0.0 if zeros else torch.ones_like(exact, dtype=torch.bool)
    centroids = _start(exact, free, clusters - zeros, initialization)
    for _ in range(sweeps):
        moved = _means(exact, free, _nearest(exact, centroids), centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    if zeros:
        centroids = torch.cat([torch.zeros_like(centroids[:, :1]), centroids], dim=1)
    centroids = centroids.to(values.dtype)
    return centroids, assign(values, centroids, free=free, zeros=zeros)


def assign(values: Tensor, centroids: Tensor, *, free: Tensor, zeros: bool) -> Tensor:
    """The nearest centroid of each value: place in its row; those that are not ``free`` have the first."""
    if not zeros:
        return _nearest(values.double(), centroids.double())
    places = _nearest(values.double(), centroids[:, 1:].double()) + 1
    return torch.where(free, places, 0)


def _start(values: Tensor, free: Tensor, clusters: int, initialization: Initialization) -> Tensor:
    steps = torch.linspace(0.0, 1.0, clusters, dtype=values.dtype, device=values.device)
    if initialization == "linear":
        low = values.masked_fill(~free, float("inf")).amin(1, keepdim=True)
        high = values.masked_fill(~free, float("-inf")).amax(1, keepdim=True)
        centroids = low + (high - low) * steps
    else:
        rows = [row[mask].sort().values for row, mask in zip(values, free, strict=True)]
        places = (steps - 0.5 / clusters + steps.flip(0) * (1.0 / clusters)).clamp(0.0, 1.0)
        centroids = torch.stack([_quantiles(row, places) for row in rows])
    return torch.where(torch.isfinite(centroids), centroids, 0.0)


def _quantiles(ascending: Tensor, places: Tensor) -> Tensor:
    if not len(ascending):
        return torch.zeros_like(places)
    return ascending[(places * (len(ascending) - 1)).round().long()]


def _nearest(values: Tensor, centroids: Tensor) -> Tensor:
    ordered, order = centroids.sort(dim=1)
    borders = (ordered[:, 1:] + ordered[:, :-1]) / 2
    return order.gather(1, torch.searchsorted(borders.contiguous(), values.contiguous()))


def _means(values: Tensor, free: Tensor, places: Tensor, centroids: Tensor) -> Tensor:
    weights = free.to(values.dtype)
    sums = torch.zeros_like(centroids).scatter_add_(1, places, values * weights)
    counts = torch.zeros_like(centroids).scatter_add_(1, places, weights)
    return torch.where(counts > 0, sums / counts.clamp_min(1.0), centroids)
