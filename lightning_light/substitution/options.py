"""Options of operator substitution, with their defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_light.criteria.output_distance import Distance
from lightning_light.substitution.operators import DepthwiseSeparable, Fire, Ghost, GroupShuffle, Operator
from lightning_light.targets import Targets
from lightning_light.validation import NonNegativeInt, PositiveInt, validated

__all__ = ["DEFAULT_OPERATORS", "METHOD", "SubstitutionOptions"]

METHOD = "substitution"
"""Name of the method in the compression state and in logs."""

DEFAULT_OPERATORS: tuple[Operator, ...] = (
    DepthwiseSeparable(multiplier=1),
    DepthwiseSeparable(multiplier=2),
    DepthwiseSeparable(multiplier=4),
    GroupShuffle(groups=2),
    Ghost(ratio=2),
    Fire(ratio=0.5),
)
"""None of them starts from random weights."""


@validated
@dataclass(frozen=True)
class SubstitutionOptions:
    """What `substitute_operators` and `Substitution` have in common.

    Args:
        operators: what may take the place of a convolution; None: as in `substitute_operators`.
        targets: convolutions that may be replaced: patterns or `Targets`; all by default.
        fit_steps: optimizer steps in which each candidate is fitted to the layer's outputs; 0 for its start alone.
        distance: of the network's outputs, for the scores: ``"kl"``, the Kullback-Leibler divergence of class
            probabilities, or ``"mse"``, the squared error relative to the variance.
        class_dim: which dimension of the outputs counts classes, for ``"kl"``.
        calibration_batches: batches on which candidates are fitted and scored, and batch-norm statistics corrected.
        correct_batch_norm: move the batch-norm statistics by what the substitution did to them.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or there are no operators.
    """

    operators: Sequence[Operator] | None = None
    targets: Targets | str | list[str] | None = None
    fit_steps: NonNegativeInt = 100
    distance: Distance = "mse"
    class_dim: int = -1
    calibration_batches: PositiveInt = 8
    correct_batch_norm: bool = True

    def __post_init__(self) -> None:
        if not self.candidates:
            raise ValueError(
                "`operators=()`: expected at least one operator, found none. Leave it out for the default ones, or "
                "write for instance `operators=[Ghost(ratio=2)]`."
            )

    @property
    def candidates(self) -> Sequence[Operator]:
        """The operators that are tried."""
        return DEFAULT_OPERATORS if self.operators is None else self.operators
