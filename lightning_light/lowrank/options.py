"""Options of a low-rank factorization: what the function takes, and the callback holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_light.budgets import Budget, Latency, require_reducible
from lightning_light.lowrank.fits import Fit, WeightSVD
from lightning_light.lowrank.ranks import RankRule
from lightning_light.targets import Targets
from lightning_light.validation import PositiveInt, validated

__all__ = ["FactorizationOptions", "Form", "RankAllocation", "candidate_forms", "check_request"]

Form = Literal["auto", "channel", "spatial", "tucker2", "depthwise"]
"""Form of factorized convolutions; ``"auto"`` chooses per layer."""


@validated
@dataclass(frozen=True)
class RankAllocation:
    """Constraints on the ranks, and how the errors of different layers are compared.

    Args:
        round_to: ranks are multiples of it; a layer narrower than it keeps its full rank. In linear layers rank
            24 runs faster than rank 23, and about as fast as rank 18.
        min_rank: smallest rank of any layer.
        faster_only: leave a layer dense if its factors, timed on this machine, do not run faster.
        importance: weight of a layer's error under a budget: ``"equal"`` counts the lost fraction of the layer's own
            energy, ``"output"`` how much the network's output changes on calibration batches.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> RankAllocation(round_to=4).min_rank
        1
    """

    round_to: PositiveInt = 8
    min_rank: PositiveInt = 1
    faster_only: bool = False
    importance: Literal["equal", "output"] = "equal"


@validated
@dataclass(frozen=True)
class FactorizationOptions:
    """Everything about a factorization except what to reach and when.

    Args:
        fit: the norm in which the low-rank approximation is optimal.
        form: of factorized convolutions.
        targets: layers that may be replaced: patterns or `Targets`.
        split: pattern of a fused linear layer, or of a `torch.nn.MultiheadAttention` -> number of equal parts of it,
            or of each of its projections; every part gets its own ranks.
        allocation: constraints on the ranks.
        calibration_batches: number of batches that a data-dependent fit or rule looks at.
        correct_batch_norm: move batch-norm statistics by what the factorization changed, with data.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
    """

    fit: Fit = WeightSVD()
    form: Form = "auto"
    targets: Targets | str | list[str] | None = None
    split: dict[str, int] | None = None
    allocation: RankAllocation = RankAllocation()
    calibration_batches: PositiveInt = 16
    correct_batch_norm: bool = True

    def measures_output(self, budget: Budget | RankRule) -> bool:
        """Check whether ranks depend on the change of the network's output, which is measured on fixed batches."""
        return budget.measures if isinstance(budget, RankRule) else self.allocation.importance == "output"


def candidate_forms(form: Form, budget: Budget | RankRule) -> str:
    """Return ``"timed"`` where all forms are compared: ``"depthwise"`` only by latency, as it is often slower."""
    return "timed" if form == "auto" and isinstance(budget, Latency) else form


def check_request(call: str, budget: Budget | RankRule, options: FactorizationOptions, *, has_data: bool) -> None:
    """Refuse a budget whose quantity factors do not reduce, and to measure the output without fixed batches.

    Raises:
        ValueError: the quantity is, for instance, the number of channels or of zeros; or ``data`` are missing.
    """
    if isinstance(budget, Budget):
        require_reducible(call, budget, "factors")
    if options.measures_output(budget) and not has_data:
        raise ValueError(
            f"`{call}(...)`: `importance='output'` and `OutputChange` measure the output on fixed batches: "
            "expected `data`, a DataLoader without shuffling or a list of batches, found None."
        )
