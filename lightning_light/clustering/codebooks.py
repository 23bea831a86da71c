"""Find the weights to cluster, and their first codebooks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_light.clustering.cluster_training import Clusters
from lightning_light.clustering.kmeans import assign, kmeans
from lightning_light.clustering.options import WeightClusteringOptions
from lightning_light.errors import UnsupportedError
from lightning_light.helper_networks import inside
from lightning_light.targets import as_targets
from lightning_light.trained_weights import trained_weights

__all__ = [
    "cluster_average",
    "clusterable_weights",
    "clusters_of",
    "first_clusters",
    "harden",
    "plain_entry",
    "weight_of",
]

_SMALLEST = 4  # weights per value, below which a codebook is larger than the weights it replaces


def clusterable_weights(
    model: nn.Module,
    options: WeightClusteringOptions,
    call: str = "WeightClustering",
    left_alone: Sequence[str] = (),
) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the name and the weight of every layer to cluster, of ``model`` itself under an empty name.

    A shared weight is yielded once, of ``left_alone`` none.

    Raises:
        TargetError: the targets match nothing.
        UnsupportedError: a layer under weight norm, with one codebook for all of its outputs.
    """
    seen: set[int] = set()
    for name, module in as_targets(options.targets).select(model, root=True).items():
        weight = None if inside(name, left_alone) else weight_of(module)
        if weight is not None and weight.dim() > 1 and weight.numel() >= 2 * _SMALLEST and id(weight) not in seen:
            _refuse_shared_codebook(call, name, module, options)
            seen.add(id(weight))
            yield name, weight


def weight_of(module: nn.Module) -> nn.Parameter | None:
    """Return the trained weight of a layer, also where a parametrization computes the layer's weight from it."""
    found = next((source.parameter for source in trained_weights(module) if source.tensor == "weight"), None)
    if found is None and parametrize.is_parametrized(module, "weight"):
        original = getattr(getattr(module.parametrizations, "weight", None), "original", None)
        found = original if isinstance(original, nn.Parameter) else None
    return found if found is not None and not nn.parameter.is_lazy(found) else None


def _refuse_shared_codebook(call: str, name: str, module: nn.Module, options: WeightClusteringOptions) -> None:
    """Refuse one codebook for all outputs of a layer under weight norm, which scales every output by its own factor."""
    normed = any(source.norm == "weight norm" and source.tensor == "weight" for source in trained_weights(module))
    if normed and options.granularity == "layer":
        raise UnsupportedError(
            f"`{call}(granularity='layer')` on `{name}`: expected a weight that the layer computes with, found one "
            "under weight norm, which scales every output by its own factor: there would be more values than clusters. "
            f"Write `granularity='channel'`, or exclude the layer: `targets=Targets(exclude={name!r})`."
        )


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


@torch.no_grad()
def cluster_average(weight: nn.Parameter, clusters: Clusters) -> Clusters:
    """Set every weight of an average to the mean of its cluster, in place, and return the clusters of the average.

    An average that began before the clustering, or over which assignments have changed, has more values.
    """
    means = clusters.pinned(clusters.means(weight.detach().reshape(clusters.assignments.shape)))
    found = Clusters(means, clusters.assignments, clusters.zero_centroid)
    weight.copy_(found.values().reshape(weight.shape))
    return found


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
