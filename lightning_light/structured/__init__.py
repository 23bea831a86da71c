"""Structured pruning: channels leave, and everything that hangs on them leaves with them."""

from lightning_light.structured.functional import prune_channels
from lightning_light.structured.ranking import Global, Isomorphic, Local, Ranking
from lightning_light.structured.regularization import GroupLasso, GrowingRegularization, SparsityRegularizer
from lightning_light.structured.structured_pruning import StructuredPruning

__all__ = [
    "Global",
    "GroupLasso",
    "GrowingRegularization",
    "Isomorphic",
    "Local",
    "Ranking",
    "SparsityRegularizer",
    "StructuredPruning",
    "prune_channels",
]
