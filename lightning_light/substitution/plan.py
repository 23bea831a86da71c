"""Choose an operator for each layer under a budget; nothing is changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_light.budgets import Budget
from lightning_light.calibration import finite_outputs
from lightning_light.criteria.output_distance import output_distance
from lightning_light.errors import BudgetError
from lightning_light.example_input import ExampleInput
from lightning_light.formatting import DataTable, Tabular, layer_lines, plural
from lightning_light.integer_program import choose_items
from lightning_light.isolation import isolated
from lightning_light.order import Stage
from lightning_light.progress_bar import with_progress_bar
from lightning_light.substitution.candidates import Candidate, Candidates, require_reachable
from lightning_light.substitution.fitting import fit_operator, record_layer
from lightning_light.substitution.operators import Operator
from lightning_light.substitution.options import METHOD, SubstitutionOptions
from lightning_light.surgery.attachment import check_owners
from lightning_light.surgery.trial import temporarily_replaced

__all__ = ["SubstitutionPlan", "plan_substitution"]

_ATTEMPTS = 5  # to meet a budget whose quantity is not the sum of the layers'


@dataclass(frozen=True)
class SubstitutionPlan(Tabular):
    """Which layers are replaced by what.

    Attributes:
        operators: name of each layer that is replaced -> its operator.
        table: all candidates, fitted and scored.
        skipped: name of each targeted convolution without a candidate -> the reason.
        quantity: of the budget.
        before: its value.
        after: the same with the operators.
        layers: name -> the fitted layers.
    """

    operators: Mapping[str, Operator] = field(default_factory=dict)
    table: Sequence[Candidate] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    quantity: str = ""
    before: float = 0.0
    after: float = 0.0
    layers: Mapping[str, nn.Module] = field(default_factory=dict, repr=False)

    def lines(self) -> list[str]:
        """Return the plan as text: a line per layer and operator, with cost, score, and what was chosen."""
        rows = [("layer", "operator", f"{self.quantity} saved", "layer error", "output distance", "")]
        for row in self.table:
            chosen = "chosen" if self.operators.get(row.layer) == row.operator else ""
            saved = f"{-row.cost / self.before:.1%}"
            rows.append((row.layer, repr(row.operator), saved, f"{row.error:.3g}", f"{row.score:.3g}", chosen))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        padded = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return [line.rstrip() for line in padded] + self._left_alone()

    def replacements(self) -> list[str]:
        """Return a line for each convolution: its operator, or why it is left alone."""
        return [f"{name}: {operator!r}" for name, operator in self.operators.items()] + self._left_alone()

    def _left_alone(self) -> list[str]:
        return [f"{name}: left alone ({reason})" for name, reason in self.skipped.items()]

    @override
    def tables(self) -> list[DataTable]:
        """Return one line per convolution; `lines` has all candidates."""
        return [layer_lines(self.replacements(), self.summary())]

    def summary(self) -> str:
        """Return what is replaced, in a few words."""
        share = f"{self.after / self.before:.0%} of {self.quantity}" if self.before else "nothing"
        return f"replaced {plural(len(self.operators), 'convolution')}, {share} remain"


def plan_substitution(
    model: nn.Module,
    budget: Budget,
    candidates: Candidates,
    calls: Sequence[ExampleInput],
    goal: float,
    options: SubstitutionOptions,
    measure: Callable[[], float],
    *,
    progress_bar: bool = True,
) -> SubstitutionPlan:
    """Fit and score the candidates, and choose one or none for each layer: the lowest sum of scores for the budget.

    Args:
        model: left as it is.
        budget: whose quantity counts.
        candidates: of `find_candidates`.
        calls: calibration data, one call per batch.
        goal: value of the quantity to reach.
        options: how candidates are fitted and scored.
        measure: measures the quantity, also with the chosen operators in place.
        progress_bar: show progress where there is a terminal.

    Raises:
        BudgetError: the goal cannot be reached.
        ValueError: outputs of the network are not finite.
        UnsupportedError: a later method owns one of the layers.
    """
    before = measure()
    plan = SubstitutionPlan({}, (), candidates.skipped, budget.quantity, before, before)
    if before <= goal:
        return plan
    require_reachable(candidates, budget, before, goal)
    check_owners(model, candidates.layers, method=METHOD, stage=Stage.SUBSTITUTION, replaces=True)
    after = before
    with isolated(model):
        rows, layers = _fitted(model, candidates, calls, options, progress_bar)
        target = goal
        for _ in range(_ATTEMPTS):
            chosen = _choose(rows, candidates.layers, target - before)
            if chosen is None:
                break
            operators = {row.layer: row.operator for row in chosen}
            new = {row.layer: layers[row.layer, row.operator] for row in chosen}
            with temporarily_replaced(model, new):
                after = measure()
            if after <= goal:
                return replace(plan, operators=operators, table=rows, after=after, layers=new)
            target = before + sum(row.cost for row in chosen) - (after - goal)
    raise BudgetError(
        f"`{budget!r}` is not met by the operators that should meet it: expected {budget.quantity} <= {goal:.6g}, "
        f"found {after:.6g}, since it is not the sum of what single layers save. Give a milder budget."
    )


def _fitted(
    model: nn.Module,
    candidates: Candidates,
    calls: Sequence[ExampleInput],
    options: SubstitutionOptions,
    progress_bar: bool,
) -> tuple[list[Candidate], dict[tuple[str, Operator], nn.Module]]:
    """Fit each candidate to its layer, and score it by the outputs of the network with it alone."""
    reference = finite_outputs(f"`{type(model).__name__}` on the calibration data", model, calls)
    table: list[Candidate] = []
    fitted: dict[tuple[str, Operator], nn.Module] = {}
    torch.manual_seed(0)  # of random starts; `isolated` restores the generators
    rows = with_progress_bar(candidates.found, len(candidates.found), "Fitting operators", shown=progress_bar)
    name, recorded = "", tuple[list[Tensor], list[Tensor]](([], []))
    for row in rows:
        if row.layer != name:
            name, recorded = row.layer, record_layer(model, row.layer, calls)
        conv = cast(nn.Conv2d, model.get_submodule(row.layer))
        layers, error = fit_operator(row.operator, conv, *recorded, options.fit_steps)
        with temporarily_replaced(model, {row.layer: layers}):
            found = [model(*call.args, **call.kwargs) for call in calls]
        distances = [
            output_distance(new, old, options.distance, options.class_dim)
            for new, old in zip(found, reference, strict=True)
        ]
        table.append(replace(row, error=error, score=float(torch.stack(distances).mean())))
        fitted[row.layer, row.operator] = layers
    return table, fitted


def _choose(table: Sequence[Candidate], layers: Sequence[str], limit: float) -> list[Candidate] | None:
    """Return the best choice whose costs sum up to ``limit``, at most one per layer, or None."""
    groups = [{place for place, row in enumerate(table) if row.layer == layer} for layer in layers]
    found = choose_items([row.score for row in table], [[row.cost for row in table]], [limit], exclusive=groups)
    return None if found is None else [table[place] for place in found]
