"""Operators: which convolutions are replaced by lighter ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from typing_extensions import override

from lightning_light.budgets import MACs
from lightning_light.example_input import ExampleInput
from lightning_light.isolation import isolated
from lightning_light.nas.choices import Change, Choices, Item
from lightning_light.order import Stage
from lightning_light.substitution import Operator, SubstitutionPlan
from lightning_light.substitution.apply import apply_operators
from lightning_light.substitution.candidates import find_candidates
from lightning_light.substitution.fitting import fit_operator, record_layer
from lightning_light.substitution.options import METHOD, SubstitutionOptions
from lightning_light.targets import Targets
from lightning_light.validation import NonNegativeInt, validated

__all__ = ["OperatorChoices"]

_SAMPLES = 32  # of each calibration batch, on which operators are fitted


@validated
@dataclass(frozen=True)
class OperatorChoices(Choices):
    """Replace a convolution by a lighter operator, as `Substitution` does.

    An operator starts in closed form from the weights of the convolution and from its inputs and outputs in the
    calibration batches.

    Args:
        operators: what may take the place of a convolution; None: those of
            `lightning_light.substitute_operators`. Offered where they have fewer multiply-accumulates.
        targets: convolutions that may be replaced: patterns or `Targets`; all by default.
        fit_steps: optimizer steps in which an operator is fitted after its start, for every network that is compared.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or there are no operators.
    """

    kind = "operators"
    stage = Stage.SUBSTITUTION

    operators: Sequence[Operator] | None = None
    targets: Targets | str | list[str] | None = None
    fit_steps: NonNegativeInt = 0

    def __post_init__(self) -> None:
        self._options()  # refuses an empty list

    @override
    def items(self, model: nn.Module, example: ExampleInput) -> list[Item]:
        found = find_candidates(model, MACs(1.0), example, self._options()).found
        return [Item(self.kind, one.layer, repr(one.operator), frozenset({one.layer})) for one in found]

    @override
    def plan(
        self, model: nn.Module, example: ExampleInput, items: Sequence[Item], calls: Sequence[ExampleInput] = ()
    ) -> SubstitutionPlan:
        by_name = {repr(operator): operator for operator in self._options().candidates}
        operators = {item.target: by_name[item.choice] for item in items}
        few = [call.small(_SAMPLES) for call in calls]
        with isolated(model):
            torch.manual_seed(0)  # of random starts; `isolated` restores the generators
            layers = {name: self._layers(model, name, operator, few).cpu() for name, operator in operators.items()}
        return SubstitutionPlan(operators, layers=layers)

    @override
    def carry_out(self, model: nn.Module, plan: SubstitutionPlan, **followers: Any) -> Change:
        entry = apply_operators(model, plan, **followers)
        return Change(entry, method=METHOD, layers=tuple(plan.layers), follows_cuts=True)

    def _layers(self, model: nn.Module, name: str, operator: Operator, calls: Sequence[ExampleInput]) -> nn.Module:
        conv = cast(nn.Conv2d, model.get_submodule(name))
        if not calls:  # to count
            return operator.build(conv).to(conv.weight)
        return fit_operator(operator, conv, *record_layer(model, name, calls), self.fit_steps)[0]

    def _options(self) -> SubstitutionOptions:
        return SubstitutionOptions(self.operators, self.targets)
