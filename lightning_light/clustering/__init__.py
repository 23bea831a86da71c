"""Weight clustering: a few values per layer, and a file of a few bits per weight."""

from lightning_light.clustering.cluster_training import DKM, CentroidTraining, ClusterTraining, StraightThroughEstimator
from lightning_light.clustering.files import ClusteredTensor, clustered_sizes, load_clustered, save_clustered
from lightning_light.clustering.functional import cluster
from lightning_light.clustering.options import WeightClusteringOptions
from lightning_light.clustering.weight_clustering import WeightClustering

__all__ = [  # plain order, capitals or not
    "CentroidTraining",
    "ClusterTraining",
    "ClusteredTensor",
    "DKM",
    "StraightThroughEstimator",
    "WeightClustering",
    "WeightClusteringOptions",
    "cluster",
    "clustered_sizes",
    "load_clustered",
    "save_clustered",
]
