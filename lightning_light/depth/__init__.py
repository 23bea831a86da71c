"""Depth pruning: remove whole residual blocks, one at a time."""

from lightning_light.depth.criteria import BlockCriterion, BlockInfluence, OutputChange
from lightning_light.depth.depth_pruning import DepthPruning
from lightning_light.depth.functional import prune_blocks
from lightning_light.depth.options import DepthPruningOptions
from lightning_light.depth.plan import DepthPlan

__all__ = [
    "BlockCriterion",
    "BlockInfluence",
    "DepthPlan",
    "DepthPruning",
    "DepthPruningOptions",
    "OutputChange",
    "prune_blocks",
]
