"""Find the weights to cluster, and their first codebooks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_light.clustering.cluster_training import Clusters
from lightning_light.clustering.kmeans import assign, kmeans
from lightning_light.clustering.options import WeightClusteringOptions
from lightning_light.targets import as_targets

__all__ = ["clusterable_weights", "clusters_of", "first_clusters", "harden", "plain_entry", "weight_of"]

_SMALLEST = 4  # weights per value, below which a codebook is larger than the weights it replaces


def clusterable_weights(model: nn.Module, options: WeightClusteringOptions) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the name and the weight of every layer to cluster; a shared weight once.

    Raises:
        TargetError: the targets match nothing.
    """
    seen: set[int] = set()
    for name, module in as_targets(options.targets).select(model).items():
        weight = weight_of(module)
        if weight is not None and weight.dim() > 1 and weight.numel() >= 2 * _SMALLEST and id(weight) not in seen:
            seen.add(id(weight))
            yield name, weight


def weight_of(module: nn.Module) -> nn.Parameter | None:
    """Return the trained weight of a layer, also where a parametrization computes the layer's weight from it."""
    if parametrize.is_parametrized(module, "weight"):
        found = getattr(module.parametrizations, "weight", None)
        original = getattr(found, "original", None)
        return original if isinstance(original, nn.Parameter) else None
    weight = module._parameters.get("weight")
    return weight if weight is not None and not nn.parameter.is_lazy(weight) else None


def first_clusters(weight: Tensor, options: WeightClusteringOptions) -> Clusters:
    """Run k-means on a weight."""
    rows = weight.detach().reshape(len(weight) if options.granularity == "channel" else 1, -1)
    zero_centroid = options.preserve_sparsity and bool((rows == 0.0).any())
    count = min(options.clusters, max(2, rows.shape[1] // _SMALLEST))
    centroids, assignments = kmeans(
        rows.float(), count, initialization=options.initialization, zero_centroid=zero_centroid
    )
    return Clusters(centroids, assignments, zero_centroid)


@torch.no_grad()
def harden(weight: nn.Parameter, clusters: Clusters) -> Clusters:
    """Set every weight to its nearest centroid, in place, and return the clusters with that assignment."""
    rows = weight.detach().reshape(clusters.assignments.shape)
    zero = clusters.zero_centroid
    assignments = assign(rows, clusters.centroids, free=clusters.free, zero_centroid=zero)
    hard = Clusters(clusters.centroids, assignments, zero)
    weight.copy_(hard.values().reshape(weight.shape))
    return hard


def plain_entry(clusters: Clusters) -> dict[str, Any]:
    """Encode clusters as plain types and tensors for a checkpoint."""
    return {
        "centroids": clusters.centroids,
        "assignments": clusters.assignments.to(torch.uint8),
        "zero_centroid": clusters.zero_centroid,
    }


def clusters_of(entry: dict[str, Any], weight: Tensor) -> Clusters:
    """Decode the entry of a checkpoint, in the type and on the device of ``weight``."""
    centroids: Tensor = entry["centroids"].to(weight)
    return Clusters(centroids, entry["assignments"].to(weight.device).long(), entry["zero_centroid"])
