"""Ranks: which layers become low-rank factors, and how small ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from typing_extensions import override

from lightning_light.example_input import ExampleInput
from lightning_light.lowrank import FactorizationPlan, factorize
from lightning_light.lowrank.apply import METHOD, apply_factors
from lightning_light.lowrank.options import RankAllocation
from lightning_light.lowrank.ranks import Measure, RankRule
from lightning_light.lowrank.spectra import MatrixSpectrum, Ranks, Spectrum
from lightning_light.nas.choices import Change, Choices, Item
from lightning_light.order import Stage
from lightning_light.targets import Targets
from lightning_light.validation import OpenFraction, validated

__all__ = ["RankChoices"]


@validated
@dataclass(frozen=True)
class RankChoices(Choices):
    """Replace a layer by two low-rank factors with a fraction of its weights, as `LowRankFactorization` does.

    Args:
        remaining: fractions of a layer's weights that its factors may have, in (0, 1]; ranks are rounded up to
            multiples of ``allocation.round_to``.
        form: of factorized convolutions: ``"spatial"``, kx1 then 1xk, or ``"channel"``, kxk then 1x1.
        targets: layers that may be replaced: patterns or `Targets`. Attention layers stay as they are.
        allocation: constraints on the ranks.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
    """

    kind = "ranks"
    stage = Stage.FACTORS

    remaining: tuple[OpenFraction, ...] | list[OpenFraction] = (0.5, 0.33, 0.25)
    form: Literal["channel", "spatial"] = "spatial"
    targets: Targets | str | list[str] | None = None
    allocation: RankAllocation = RankAllocation()

    @override
    def items(self, model: nn.Module, example: ExampleInput) -> list[Item]:
        found: dict[tuple[str, Ranks], Item] = {}  # fractions that round to the same ranks are one choice
        for fraction in self.remaining:
            for name, layer in self._factors(model, example, fraction, self.targets).layers.items():
                item = Item(self.kind, name, f"{fraction:g}", frozenset({name}))
                if not layer.owner:
                    found.setdefault((name, layer.ranks), item)
        return list(found.values())

    @override
    def plan(
        self, model: nn.Module, example: ExampleInput, items: Sequence[Item], calls: Sequence[ExampleInput] = ()
    ) -> FactorizationPlan:
        names: dict[str, list[str]] = {}
        for item in items:
            names.setdefault(item.choice, []).append(item.target)
        plans = [self._factors(model, example, float(choice), targets) for choice, targets in names.items()]
        return FactorizationPlan({name: layer for plan in plans for name, layer in plan.layers.items()})

    @override
    def carry_out(self, model: nn.Module, plan: FactorizationPlan, **followers: Any) -> Change:
        entry = apply_factors(model, plan, **followers)
        return Change(entry, method=METHOD, layers=tuple(plan.layers))

    def _factors(
        self, model: nn.Module, example: ExampleInput, fraction: float, targets: Targets | str | list[str] | None
    ) -> FactorizationPlan:
        rule = _WeightFraction(fraction)
        options: dict[str, Any] = {"form": self.form, "allocation": self.allocation, "dry_run": True}
        return factorize(model, example, rule, targets=targets, **options)


@dataclass(frozen=True)
class _WeightFraction(RankRule):
    """The rank at which the two factors of a matrix have ``fraction`` of its elements."""

    fraction: float

    @override
    def __call__(self, spectrum: Spectrum, measure: Measure | None) -> Ranks:
        assert isinstance(spectrum, MatrixSpectrum)  # of every form but "tucker2"
        rows, columns = spectrum.shape
        return (max(1, round(self.fraction * rows * columns / (rows + columns))),)
