"""Options of weight clustering, with their defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from lightning_light.clustering.kmeans import Initialization
from lightning_light.targets import TargetsLike
from lightning_light.validation import Range, validated

__all__ = ["ClusterCount", "Granularity", "WeightClusteringOptions"]

ClusterCount: TypeAlias = Annotated[int, Range(2, 256)]
Granularity: TypeAlias = Literal["layer", "channel"]


@validated
@dataclass(frozen=True)
class WeightClusteringOptions:
    """Select which weights share values, and how many. Used by `cluster` and `WeightClustering`.

    Args:
        clusters: different values per layer, or per output channel, from 2 to 256.
        granularity: ``"layer"``, one codebook per layer; ``"channel"``, one per output channel.
        initialization: of k-means: ``"linear"`` or ``"density"``.
        preserve_sparsity: weights that are zero stay zero, with a centroid of their own.
        targets: layers to cluster: patterns or `Targets`; all with a weight of two or more axes by default.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an argument out of range.
    """

    clusters: ClusterCount = 16
    granularity: Granularity = "layer"
    initialization: Initialization = "linear"
    preserve_sparsity: bool = True
    targets: TargetsLike = None
