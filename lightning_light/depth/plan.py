"""Plan which residual blocks to remove for a budget; nothing is changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn
from typing_extensions import override

from lightning_light.budgets import Budget
from lightning_light.depth.blocks import Blocks, find_blocks, without_blocks
from lightning_light.depth.criteria import BlockCriterion
from lightning_light.depth.options import DepthPruningOptions
from lightning_light.errors import BudgetError
from lightning_light.example_input import ExampleInput
from lightning_light.formatting import DataTable, Tabular, layer_lines
from lightning_light.targets import as_targets

__all__ = ["DepthPlan", "check_budget", "plan_blocks"]


@dataclass(frozen=True)
class DepthPlan(Tabular):
    """Which blocks are removed.

    Attributes:
        removed: names, the first to be removed first.
        scores: name of each block that could be removed -> its score before the first removal.
        kept: name of each other module that was considered -> the reason why it is kept.
        before: value of the budget's quantity.
        after: the same without the removed blocks.
    """

    removed: list[str] = field(default_factory=list)
    scores: Mapping[str, float] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)
    before: float = 0.0
    after: float = 0.0

    def lines(self) -> list[str]:
        """Return the plan as text: a line per block."""
        scored = [
            f"{name}: {'removed' if name in self.removed else 'stays'} (score {score:.3g})"
            for name, score in self.scores.items()
        ]
        return [*scored, *(f"{name}: kept ({reason})" for name, reason in self.kept.items())]

    @override
    def tables(self) -> list[DataTable]:
        """Return one line per block."""
        return [layer_lines(self.lines())]


def check_budget(
    model: nn.Module,
    budget: Budget,
    example: ExampleInput,
    options: DepthPruningOptions,
    goal: float,
    measure: Callable[[], float],
) -> Blocks:
    """Return the blocks of ``model``, and refuse a budget that is out of reach without all of them.

    Args:
        model: left as it is.
        budget: whose quantity counts.
        example: one call of the model.
        options: which modules are considered.
        goal: value of the quantity to reach.
        measure: measures the quantity.

    Raises:
        BudgetError: the budget cannot be reached.
        TargetError: ``options.targets`` match no module.
    """
    blocks = find_blocks(model, example, as_targets(options.targets))
    least = _measure_without(model, blocks.names, measure)
    if least > goal:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in blocks.kept.items())
        raise BudgetError(
            f"`{budget!r}` cannot be reached by removing blocks: expected {budget.quantity} <= {goal:.6g}, found "
            f"{least:.6g} without any of the {len(blocks.names)} residual blocks. Widen `targets`, give a milder "
            f"budget, or prune channels too (`StructuredPruning`). Kept: {reasons or 'nothing'}."
        )
    return blocks


def plan_blocks(
    model: nn.Module,
    blocks: Blocks,
    criterion: BlockCriterion,
    calls: Sequence[ExampleInput],
    goal: float,
    measure: Callable[[], float],
) -> DepthPlan:
    """Remove the least important block, score the others without it, and so on until the budget is met.

    Where one more block is enough, it is the least important one that is.

    Args:
        model: left as it is.
        blocks: which may be removed.
        criterion: scores them.
        calls: of the model, one per batch.
        goal: value of the quantity to reach.
        measure: measures the quantity.
    """
    before = now = measure()
    savings = {name: before - _measure_without(model, [name], measure) for name in blocks.names}
    removed: list[str] = []
    first: dict[str, float] = {}
    while now > goal and len(removed) < len(blocks.names):
        with without_blocks(model, removed):
            scores = criterion(model, [name for name in blocks.names if name not in removed], calls)
        first = first or scores
        enough = [name for name in scores if now - savings[name] <= goal]
        removed.append(min(enough or scores, key=scores.__getitem__))
        now = _measure_without(model, removed, measure)
    return DepthPlan(removed, first, blocks.kept, before, now)


def _measure_without(model: nn.Module, names: Sequence[str], measure: Callable[[], float]) -> float:
    with without_blocks(model, names):
        return measure()
