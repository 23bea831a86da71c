"""Structured pruning: remove channels, and everything that depends on them, in one step."""

from lightning_light.structured.functional import prune_channels
from lightning_light.structured.options import ChannelPruningOptions, Widths
from lightning_light.structured.ranking import Global, Isomorphic, Local, Ranking
from lightning_light.structured.regularization import GroupLasso, GrowingRegularization, SparsityRegularizer
from lightning_light.structured.sensitivity import Sensitivity
from lightning_light.structured.structured_pruning import StructuredPruning

__all__ = [
    "ChannelPruningOptions",
    "Global",
    "GroupLasso",
    "GrowingRegularization",
    "Isomorphic",
    "Local",
    "Ranking",
    "Sensitivity",
    "SparsityRegularizer",
    "StructuredPruning",
    "Widths",
    "prune_channels",
]
