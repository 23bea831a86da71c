"""Structured pruning: channels leave, and everything that hangs on them leaves with them."""

from lightning_light.structured.functional import prune_channels
from lightning_light.structured.ranking import Global, Isomorphic, Local, Ranking
from lightning_light.structured.sparsity import GroupLasso, GrowingRegularization, SparsityLearning
from lightning_light.structured.structured_pruning import StructuredPruning

__all__ = [
    "Global",
    "GroupLasso",
    "GrowingRegularization",
    "Isomorphic",
    "Local",
    "Ranking",
    "SparsityLearning",
    "StructuredPruning",
    "prune_channels",
]
