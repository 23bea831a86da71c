"""Options of unstructured and patterned pruning, with their defaults."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_light.budgets import Sparsity
from lightning_light.criteria import Criterion, Magnitude, check_needs
from lightning_light.sparsity.patterns import NM, Pattern, Unstructured
from lightning_light.sparsity.scope import Scope
from lightning_light.targets import TargetsLike
from lightning_light.validation import OpenFraction, PositiveInt, validated

__all__ = ["WeightPruningOptions", "check_sparsity"]


@validated
@dataclass(frozen=True)
class WeightPruningOptions:
    """Select which weights are masked, and how many. Used by `prune_weights` and `WeightPruning`.

    Args:
        budget: ``Sparsity(amount)`` of the targets' weights. None with `NM`, which determines it, or ``remaining``.
        criterion: scores weights; the lowest scores are masked first.
        pattern: what is masked together: `Unstructured`, `NM`, `Block`, `Filter`, `Kernel`, `Row`, `Column`.
        scope: ``"global"``, one threshold for all; ``"local"``, the same sparsity in each layer; ``"erk"``, a higher
            one in larger layers; ``"lamp"``, global after scaling each layer's scores.
        targets: layers whose weights may be masked: patterns or `Targets`.
        remaining: layer pattern -> fraction of its weights that remain, in (0, 1]; overrides the budget there.
        calibration_batches: optimizer steps, or batches of ``data``, over which a criterion's evidence is gathered.
        seed: for criteria that draw random numbers.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an argument out of range, or arguments that contradict each other.
    """

    budget: Sparsity | None = None
    criterion: Criterion = Magnitude()
    pattern: Pattern = Unstructured()
    scope: Scope = "global"
    targets: TargetsLike = None
    remaining: dict[str, OpenFraction] | None = None
    calibration_batches: PositiveInt = 8
    seed: int = 0

    def sparsity_at(self, fraction: float) -> float:
        """Return the sparsity at ``fraction`` of the way to the budget, outside the layers named in ``remaining``."""
        return 0.0 if self.budget is None else self.budget.at(0.0, fraction)

    def check(self, call: str) -> None:
        """Refuse arguments of ``call`` that contradict each other.

        Raises:
            ValueError: no budget, a budget beside the one of `NM`, or one that leaves no weight.
            UnsupportedError: the criterion scores coupled channels.
        """
        check_needs(call, self.criterion)
        if isinstance(self.pattern, NM):
            if self.remaining or (self.budget is not None and self.budget.amount != self.pattern.sparsity):
                raise ValueError(
                    f"`{call}({self.budget!r}, pattern={self.pattern!r}, remaining={self.remaining})`: expected no "
                    f"other budget, since the pattern is a sparsity of {self.pattern.sparsity:g} in every layer. Write "
                    f"`{call}(pattern={self.pattern!r})`."
                )
        elif self.budget is None and not self.remaining:
            raise ValueError(
                f"`{call}()`: expected a budget, `remaining`, or an N:M pattern, found none. To mask nine weights of "
                f"ten give `budget=Sparsity(0.9)`."
            )
        if self.budget is not None:
            check_sparsity(call, self.budget)


def check_sparsity(call: str, budget: Sparsity) -> None:
    """Refuse a budget that leaves no weight.

    Raises:
        ValueError: the sparsity is 1.
    """
    if budget.amount >= 1.0:
        raise ValueError(f"`{call}({budget!r})`: expected a sparsity below 1, found 1: no weight would remain.")
