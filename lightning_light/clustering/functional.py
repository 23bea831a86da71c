"""Cluster the weights of a network, without a Trainer."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from lightning_light.clustering.codebooks import clusterable_weights, first_clusters, harden
from lightning_light.clustering.files import ClusteredTensor, clustered_sizes
from lightning_light.clustering.kmeans import Initialization
from lightning_light.clustering.options import ClusterCount, Granularity, WeightClusteringOptions
from lightning_light.example_input import ExampleInput
from lightning_light.helper_networks import helper_networks
from lightning_light.order import Stage
from lightning_light.surgery.attachment import check_owners
from lightning_light.targets import TargetsLike, as_targets
from lightning_light.trained_weights import uncovered_parameters, uncovered_text
from lightning_light.validation import validated

__all__ = ["cluster"]

_LOGGER = logging.getLogger(__name__)


@validated
def cluster(
    model: nn.Module,
    example_inputs: Any = None,
    clusters: ClusterCount = WeightClusteringOptions.clusters,
    *,
    granularity: Granularity = WeightClusteringOptions.granularity,
    initialization: Initialization = WeightClusteringOptions.initialization,
    preserve_sparsity: bool = WeightClusteringOptions.preserve_sparsity,
    targets: TargetsLike = WeightClusteringOptions.targets,
) -> list[ClusteredTensor]:
    """Cluster the weights of every layer by k-means, in place; `save_clustered` then writes a small file.

    To train on with clustered weights use `WeightClustering`.

    Args:
        model: any module.
        example_inputs: of one call; frozen parts of the model that it does not call are left alone. None: all count.
        clusters: different values per layer, or per output channel, from 2 to 256.
        granularity: ``"layer"``, one codebook per layer; ``"channel"``, one per output channel.
        initialization: of k-means: ``"linear"`` or ``"density"``.
        preserve_sparsity: weights that are zero stay zero, with a centroid of their own.
        targets: layers to cluster: patterns or `Targets`.

    Returns:
        The size of every clustered weight in a file.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an argument out of range.
        TargetError: the targets match nothing.
        UnsupportedError: a later method owns one of the layers.

    Example:
        >>> layer = nn.Linear(64, 64)
        >>> (row,) = cluster(layer, clusters=4)
        >>> len(layer.weight.unique()), row.bits < 3
        (4, True)
    """
    if isinstance(example_inputs, int):
        raise TypeError(
            f"`cluster(model, {example_inputs})`: expected the number of clusters after the example inputs, found it "
            f"in their place. Write `cluster(model, None, {example_inputs})`."
        )
    options = WeightClusteringOptions(clusters, granularity, initialization, preserve_sparsity, targets)
    helpers = [] if example_inputs is None else helper_networks(model, ExampleInput.of(example_inputs))
    if helpers:
        _LOGGER.info("cluster: left alone, frozen and not called: %s", helpers)
    weights = dict(clusterable_weights(model, options, "cluster", helpers))
    if uncovered := uncovered_parameters(model, as_targets(targets), weights.values()):
        _LOGGER.info("cluster: %s", uncovered_text(uncovered))
    check_owners(model, weights, method="cluster", stage=Stage.CLUSTERING)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for weight in weights.values():
        harden(weight, first_clusters(weight, options))
    return clustered_sizes({names[id(weight)]: weight for weight in weights.values()})
