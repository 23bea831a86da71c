"""What the callbacks of this wing refuse, where the user wrote it."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_light.budgets import Budget, Sparsity
from lightning_light.schedules import Schedule
from lightning_light.sparsity.mask_schedules import Alternating, DenseSparseDense, Rewinding
from lightning_light.sparsity.patterns import NM, Pattern
from lightning_light.sparsity.scope import check_scope

__all__ = ["check_counts", "check_pruning", "require_sparsity"]


def require_sparsity(method: str, budget: object) -> None:
    """Refuse anything but a `Sparsity` that leaves something.

    Raises:
        TypeError: ``budget`` is not a `Sparsity`.
        ValueError: it asks for nothing but zeros.
    """
    if not isinstance(budget, Sparsity):
        raise TypeError(
            f"`{method}({budget!r})`: expected `Sparsity(amount)`, the share of zeros, found "
            f"{type(budget).__name__}. Write `{method}(Sparsity(0.9))`."
        )
    if budget.amount >= 1.0:
        raise ValueError(f"`{method}({budget!r})`: expected amount < 1, found a network of zeros. Try `Sparsity(0.9)`.")


def check_counts(method: str, **counts: int) -> None:
    """Refuse what is no integer of 1 or more.

    Raises:
        ValueError: names the argument.
    """
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"`{method}({name}={count!r})`: expected an integer >= 1.")


def check_pruning(
    budget: Budget | None,
    pattern: Pattern,
    scope: str,
    amounts: Mapping[str, float] | None,
    sr_ste: float | None,
    schedule: Schedule,
    **counts: int,
) -> None:
    """Refuse arguments of `WeightPruning` that can never work.

    Raises:
        TypeError: ``budget`` is not a `Sparsity`.
        ValueError: any other value out of range.
    """
    check_scope("WeightPruning", scope)
    check_counts("WeightPruning", **counts)
    if not isinstance(schedule, Schedule):
        raise TypeError(
            f"`WeightPruning(schedule={schedule!r})`: expected a schedule, found {type(schedule).__name__}. Write for "
            "instance `schedule=Window(Cubic(), start=0.1, end=0.7)`."
        )
    if sr_ste is not None and isinstance(schedule, (Alternating, DenseSparseDense, Rewinding)):
        raise ValueError(
            f"`WeightPruning(schedule={schedule!r}, sr_ste={sr_ste})`: expected a schedule that only rises, since "
            "SR-STE lets masks change by itself. Use `Window(...)` or `OneShot()`."
        )
    if isinstance(pattern, NM):
        _check_nm(budget, pattern, amounts, sr_ste)
        return
    if sr_ste is not None:
        raise ValueError(
            f"`WeightPruning(pattern={pattern!r}, sr_ste={sr_ste})`: expected an N:M pattern, which SR-STE trains. "
            "Write `WeightPruning(pattern=NM(2, 4), sr_ste=2e-4)`."
        )
    if budget is None and not amounts:
        raise ValueError(
            "`WeightPruning()`: expected a budget, `amounts`, or an N:M pattern, found none. For nine zeros out of ten "
            "write `WeightPruning(Sparsity(0.9))`."
        )
    if budget is not None:
        require_sparsity("WeightPruning", budget)
    for layer, amount in (amounts or {}).items():
        if not 0.0 <= amount < 1.0:
            raise ValueError(
                f"`WeightPruning(amounts={{{layer!r}: {amount}}})`: expected 0 <= amount < 1, the layer's share of "
                "zeros, never percent."
            )


def _check_nm(budget: Budget | None, pattern: NM, amounts: Mapping[str, float] | None, sr_ste: float | None) -> None:
    if amounts or (budget is not None and getattr(budget, "amount", None) != pattern.amount):
        raise ValueError(
            f"`WeightPruning({budget!r}, pattern={pattern!r}, amounts={amounts})`: expected no other budget, since the "
            f"pattern is one of {pattern.amount:g} zeros in every layer. Write `WeightPruning(pattern={pattern!r})`."
        )
    if sr_ste is not None and sr_ste < 0.0:
        raise ValueError(f"`WeightPruning(sr_ste={sr_ste})`: expected a decay >= 0. The paper has 2e-4.")
