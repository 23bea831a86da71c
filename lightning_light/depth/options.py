"""Options of depth pruning, with their defaults."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_light.depth.criteria import BlockCriterion, OutputChange
from lightning_light.targets import Targets
from lightning_light.validation import PositiveInt, validated

__all__ = ["DepthPruningOptions"]


@validated
@dataclass(frozen=True)
class DepthPruningOptions:
    """What `prune_blocks` and `DepthPruning` have in common.

    Args:
        criterion: `OutputChange` or `BlockInfluence`: the block with the lowest score is removed first.
        targets: residual blocks that may be removed: patterns or `Targets`; all by default.
        calibration_batches: batches on which blocks are scored and batch-norm statistics are corrected.
        correct_batch_norm: move the batch-norm statistics by what the removal did to them.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
    """

    criterion: BlockCriterion = OutputChange()
    targets: Targets | str | list[str] | None = None
    calibration_batches: PositiveInt = 8
    correct_batch_norm: bool = True
