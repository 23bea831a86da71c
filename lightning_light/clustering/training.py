"""How clustered weights learn: what the network computes with, and what becomes of its gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_light.clustering.kmeans import assign

__all__ = ["DKM", "CentroidTraining", "Clusters", "Learning", "StraightThrough"]


@dataclass
class Clusters:
    """One layer's codebook.

    Attributes:
        centroids: ``(rows, clusters)``; a row is the whole layer, or one output channel.
        places: ``(rows, n)``: to which centroid each weight belongs.
        zeros: whether the first centroid is zero and stays it, with what belonged to it in the beginning.
    """

    centroids: Tensor
    places: Tensor
    zeros: bool

    @property
    def free(self) -> Tensor:
        """Which weights may move."""
        return self.places != 0 if self.zeros else torch.ones_like(self.places, dtype=torch.bool)

    def values(self) -> Tensor:
        """Each weight's centroid, ``(rows, n)``."""
        return self.centroids.gather(1, self.places)

    def means(self, values: Tensor) -> Tensor:
        """The mean of ``values`` over each cluster, ``(rows, clusters)``; of an empty one its centroid."""
        sums = torch.zeros_like(self.centroids).scatter_add_(1, self.places, values)
        counts = torch.zeros_like(self.centroids).scatter_add_(1, self.places, torch.ones_like(values))
        return torch.where(counts > 0, sums / counts.clamp_min(1.0), self.centroids)

    def pinned(self, centroids: Tensor) -> Tensor:
        """``centroids`` with the first at zero, where it has to be."""
        return torch.cat([torch.zeros_like(centroids[:, :1]), centroids[:, 1:]], 1) if self.zeros else centroids


class Learning(ABC):
    """Between two optimizer steps the network holds what `forward` gives; the optimizer changes what lies behind it.

    Attributes:
        has_latent: whether there is a weight behind the clustered one.
    """

    has_latent: ClassVar[bool]

    @abstractmethod
    def forward(self, clusters: Clusters, latent: Tensor) -> tuple[Clusters, Tensor]:
        """After a step: the clusters as they are now, and the weights that the network computes with."""

    @abstractmethod
    def backward(self, clusters: Clusters, latent: Tensor, gradient: Tensor) -> Tensor:
        """Before a step: the gradient of ``latent`` from that of the weights."""


@dataclass(frozen=True)
class CentroidTraining(Learning):
    """Weights of one cluster move together, and stay in it: the codebook learns, the assignment does not.

    Han et al., 2016, "Deep Compression", section 3.1 (there the sum of a cluster's gradients; here their mean, so that
    the learning rate of the weights is right for the centroids too). https://arxiv.org/abs/1510.00149
    """

    has_latent: ClassVar[bool] = False

    @override
    def forward(self, clusters: Clusters, latent: Tensor) -> tuple[Clusters, Tensor]:
        moved = Clusters(clusters.pinned(clusters.means(latent)), clusters.places, clusters.zeros)
        return moved, moved.values()

    @override
    def backward(self, clusters: Clusters, latent: Tensor, gradient: Tensor) -> Tensor:
        means = Clusters(torch.zeros_like(clusters.centroids), clusters.places, clusters.zeros).means(gradient)
        return clusters.pinned(means).gather(1, clusters.places)


@dataclass(frozen=True)
class StraightThrough(Learning):
    """The gradient of a clustered weight goes to the weight behind it, which may change its cluster.

    Bengio et al., 2013, "Estimating or Propagating Gradients Through Stochastic Neurons". https://arxiv.org/abs/1308.3432
    """

    has_latent: ClassVar[bool] = True

    @override
    def forward(self, clusters: Clusters, latent: Tensor) -> tuple[Clusters, Tensor]:
        places = assign(latent, clusters.centroids, free=clusters.free, zeros=clusters.zeros)
        moved = Clusters(clusters.centroids, places, clusters.zeros)
        moved = Clusters(moved.pinned(moved.means(latent)), places, clusters.zeros)
        return moved, moved.values()

    @override
    def backward(self, clusters: Clusters, latent: Tensor, gradient: Tensor) -> Tensor:
        return gradient * clusters.free


@dataclass(frozen=True)
class DKM(Learning):
    """Each weight is a mean of all centroids by nearness, and gradients flow through that; hard at the end of the run.

    Cho et al., 2022, "DKM: Differentiable K-Means Clustering Layer for Neural Network Compression".
    https://arxiv.org/abs/2108.12659. Takes memory for ``clusters`` numbers a weight.

    Args:
        temperature: of the softmax over squared distances, as a share of the layer's variance.
        iterations: of soft k-means a step.

    Raises:
        ValueError: ``temperature`` is not above 0, or ``iterations`` below 1.
    """

    has_latent: ClassVar[bool] = True

    temperature: float = 0.01
    iterations: int = 2

    def __post_init__(self) -> None:
        if not self.temperature > 0.0 or self.iterations < 1:
            raise ValueError(f"`{self!r}`: expected temperature > 0 and iterations >= 1, such as `DKM()` has.")

    @override
    def forward(self, clusters: Clusters, latent: Tensor) -> tuple[Clusters, Tensor]:
        with torch.no_grad():
            centroids, soft = self._soft(clusters, latent)
        moved = Clusters(centroids, clusters.places, clusters.zeros)
        places = assign(latent, centroids, free=moved.free, zeros=clusters.zeros)
        return Clusters(centroids, places, clusters.zeros), soft

    @override
    def backward(self, clusters: Clusters, latent: Tensor, gradient: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = latent.detach().clone().requires_grad_()
            _, soft = self._soft(clusters, leaf)
            (found,) = torch.autograd.grad(soft, leaf, gradient)
        return found * clusters.free

    def _soft(self, clusters: Clusters, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Centroids after the iterations, and each weight as their mean by nearness."""
        free, first = clusters.free.to(latent.dtype), int(clusters.zeros)
        centroids = clusters.centroids[:, first:]
        scale = self.temperature * latent.detach().var(dim=1, keepdim=True).clamp_min(1e-12)[..., None]
        for _ in range(self.iterations):
            nearness = (-(latent[..., None] - centroids[:, None, :]).square() / scale).softmax(-1) * free[..., None]
            mass = nearness.sum(1)
            means = (nearness * latent[..., None]).sum(1) / mass.clamp_min(1e-12)
            centroids = torch.where(mass > 1e-6, means, centroids)
        nearness = (-(latent[..., None] - centroids[:, None, :]).square() / scale).softmax(-1)
        soft = (nearness * centroids[:, None, :]).sum(-1) * free
        whole = torch.cat([torch.zeros_like(centroids[:, :1]), centroids], 1) if first else centroids
        return whole, soft
