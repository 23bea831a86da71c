"""Sparsity: masks on weights, gradual, N:M, and dynamic; shapes do not change."""

from lightning_light.sparsity.dead_filters import remove_dead_channels
from lightning_light.sparsity.dynamic_sparse_training import DynamicSparseTraining
from lightning_light.sparsity.functional import prune_weights
from lightning_light.sparsity.growth import SET, Connections, DynamicMethod, RigL, SRigL, Static
from lightning_light.sparsity.mask_schedules import Alternating, DenseSparseDense, Rewinding
from lightning_light.sparsity.options import WeightPruningOptions
from lightning_light.sparsity.patterns import NM, Block, Column, Filter, Kernel, Pattern, Row, Unstructured
from lightning_light.sparsity.semi_structured import to_semi_structured
from lightning_light.sparsity.sr_ste import SRSTE
from lightning_light.sparsity.weight_pruning import WeightPruning

__all__ = [
    "Alternating",
    "Block",
    "Column",
    "Connections",
    "DenseSparseDense",
    "DynamicMethod",
    "DynamicSparseTraining",
    "Filter",
    "Kernel",
    "NM",
    "Pattern",
    "Rewinding",
    "RigL",
    "Row",
    "SET",
    "SRSTE",
    "SRigL",
    "Static",
    "Unstructured",
    "WeightPruning",
    "WeightPruningOptions",
    "prune_weights",
    "remove_dead_channels",
    "to_semi_structured",
]
