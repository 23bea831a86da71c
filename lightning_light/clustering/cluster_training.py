"""Train clustered weights: the weights of the forward pass, and the gradients of the trained ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_light.clustering.kmeans import assign
from lightning_light.validation import PositiveFloat, PositiveInt, validated

__all__ = ["DKM", "CentroidTraining", "ClusterTraining", "Clusters", "StraightThroughEstimator"]


@dataclass
class Clusters:
    """One layer's codebook.

    Attributes:
        centroids: ``(rows, clusters)``; a row is the whole layer, or one output channel.
        assignments: ``(rows, n)``: the index of each weight's centroid.
        zero_centroid: whether the first centroid is fixed at zero, with the weights that were zero at first.
    """

    centroids: Tensor
    assignments: Tensor
    zero_centroid: bool

    @classmethod
    def of(cls, entry: Mapping[str, Any], weight: Tensor) -> Clusters:
        """Decode the entry of a checkpoint, in the type and on the device of ``weight``."""
        return cls(entry["centroids"].to(weight), entry["assignments"].to(weight.device).long(), entry["zero_centroid"])

    def entry(self) -> dict[str, Any]:
        """Encode the clusters as plain types and tensors for a checkpoint."""
        return {**vars(self), "assignments": self.assignments.to(torch.uint8)}

    @property
    def free(self) -> Tensor:
        """Return a mask of the weights that are trained, which are those without a fixed centroid at zero."""
        return self.assignments != 0 if self.zero_centroid else torch.ones_like(self.assignments, dtype=torch.bool)

    def values(self) -> Tensor:
        """Return each weight's centroid, ``(rows, n)``."""
        return self.centroids.gather(1, self.assignments)

    def means(self, values: Tensor) -> Tensor:
        """Average ``values`` over each cluster, ``(rows, clusters)``; an empty cluster keeps its centroid."""
        sums = torch.zeros_like(self.centroids).scatter_add_(1, self.assignments, values)
        counts = torch.zeros_like(self.centroids).scatter_add_(1, self.assignments, torch.ones_like(values))
        return torch.where(counts > 0, sums / counts.clamp_min(1.0), self.centroids)

    def moved(self, values: Tensor) -> Clusters:
        """Return the clusters with each centroid at the mean of its ``values``."""
        return replace(self, centroids=self.pinned(self.means(values)))

    def assigned(self, values: Tensor) -> Clusters:
        """Return the clusters with each of ``values`` at its nearest centroid."""
        assignments = assign(values, self.centroids, free=self.free, zero_centroid=self.zero_centroid)
        return replace(self, assignments=assignments)

    def pinned(self, centroids: Tensor) -> Tensor:
        """Set the first of ``centroids`` to zero where it is fixed."""
        zero = torch.zeros_like(centroids[:, :1])
        return torch.cat([zero, centroids[:, 1:]], 1) if self.zero_centroid else centroids


class ClusterTraining(ABC):
    """Rule of training with clustered weights.

    Between two optimizer steps the network holds the result of `forward`; the optimizer updates the latent weights.

    Attributes:
        has_latent: whether there are latent weights that differ from the clustered ones.
    """

    has_latent: ClassVar[bool]

    @abstractmethod
    def forward(self, clusters: Clusters, latent: Tensor) -> tuple[Clusters, Tensor]:
        """Return the updated clusters, and the weights of the network, after a step on ``latent``."""

    @abstractmethod
    def backward(self, clusters: Clusters, latent: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient of ``latent`` from that of the network's weights, before a step."""


@dataclass(frozen=True)
class CentroidTraining(ClusterTraining):
    """Train the centroids; the assignment of the weights is fixed.

    Han et al., 2016, "Deep Compression", section 3.1 (there the sum of a cluster's gradients; here their mean, so that
    the learning rate of the weights is right for the centroids too). https://arxiv.org/abs/1510.00149
    """

    has_latent: ClassVar[bool] = False

    @override
    def forward(self, clusters: Clusters, latent: Tensor) -> tuple[Clusters, Tensor]:
        moved = clusters.moved(latent)
        return moved, moved.values()

    @override
    def backward(self, clusters: Clusters, latent: Tensor, gradient: Tensor) -> Tensor:
        return replace(clusters, centroids=torch.zeros_like(clusters.centroids)).moved(gradient).values()


@dataclass(frozen=True)
class StraightThroughEstimator(ClusterTraining):
    """Pass the gradient of a clustered weight to its latent weight, which may change its cluster.

    Bengio et al., 2013, "Estimating or Propagating Gradients Through Stochastic Neurons". https://arxiv.org/abs/1308.3432
    """

    has_latent: ClassVar[bool] = True

    @override
    def forward(self, clusters: Clusters, latent: Tensor) -> tuple[Clusters, Tensor]:
        moved = clusters.assigned(latent).moved(latent)
        return moved, moved.values()

    @override
    def backward(self, clusters: Clusters, latent: Tensor, gradient: Tensor) -> Tensor:
        return gradient * clusters.free


@validated
@dataclass(frozen=True)
class DKM(ClusterTraining):
    """Compute each weight as an attention-weighted mean of all centroids, differentiably; hard at the end of the run.

    Cho et al., 2022, "DKM: Differentiable K-Means Clustering Layer for Neural Network Compression".
    https://arxiv.org/abs/2108.12659. It takes memory for ``clusters`` numbers per weight.

    Args:
        temperature: of the softmax over squared distances, relative to the variance of the layer.
        iterations: of soft k-means per step.

    Raises:
        ValueError: ``temperature`` is not above 0, or ``iterations`` below 1.
    """

    has_latent: ClassVar[bool] = True

    temperature: PositiveFloat = 0.01
    iterations: PositiveInt = 2

    @override
    def forward(self, clusters: Clusters, latent: Tensor) -> tuple[Clusters, Tensor]:
        with torch.no_grad():
            centroids, soft = self._soft(clusters, latent)
        return replace(clusters, centroids=centroids).assigned(latent), soft

    @override
    def backward(self, clusters: Clusters, latent: Tensor, gradient: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = latent.detach().clone().requires_grad_()
            _, soft = self._soft(clusters, leaf)
            (found,) = torch.autograd.grad(soft, leaf, gradient)
        return found * clusters.free

    def _soft(self, clusters: Clusters, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the centroids after the iterations, and each weight as their attention-weighted mean."""
        free, first = clusters.free.to(latent.dtype), int(clusters.zero_centroid)
        centroids = clusters.centroids[:, first:]
        scale = self.temperature * latent.detach().var(dim=1, keepdim=True).clamp_min(1e-12)[..., None]
        for _ in range(self.iterations):
            attention = (-(latent[..., None] - centroids[:, None, :]).square() / scale).softmax(-1) * free[..., None]
            mass = attention.sum(1)
            means = (attention * latent[..., None]).sum(1) / mass.clamp_min(1e-12)
            centroids = torch.where(mass > 1e-6, means, centroids)
        attention = (-(latent[..., None] - centroids[:, None, :]).square() / scale).softmax(-1)
        soft = (attention * centroids[:, None, :]).sum(-1) * free
        whole = torch.cat([torch.zeros_like(centroids[:, :1]), centroids], 1) if first else centroids
        return whole, soft
