"""Weight clustering: a few values a layer, a file of a few bits a weight."""

from lightning_light.clustering.files import ClusteredTensor, clustered_sizes, load_clustered, save_clustered
from lightning_light.clustering.training import DKM, CentroidTraining, Learning, StraightThrough
from lightning_light.clustering.weight_clustering import WeightClustering

__all__ = [  # plain order, capitals or not
    "CentroidTraining",
    "ClusteredTensor",
    "DKM",
    "Learning",
    "StraightThrough",
    "WeightClustering",
    "clustered_sizes",
    "load_clustered",
    "save_clustered",
]
