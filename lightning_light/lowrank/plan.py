"""Plan a factorization: choose the form and the ranks of every layer before anything changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

import numpy as np
from torch import Tensor
from typing_extensions import override

from lightning_light.budgets import Budget, MACs
from lightning_light.errors import BudgetError
from lightning_light.formatting import DataTable, Tabular, human_count, layer_lines
from lightning_light.lowrank.allocate import Choice, allocate, frontier
from lightning_light.lowrank.build import OPERATION
from lightning_light.lowrank.layers import FactorizableLayer
from lightning_light.lowrank.options import FactorizationOptions, RankAllocation
from lightning_light.lowrank.ranks import RankRule, rounded
from lightning_light.lowrank.spectra import DEPTHWISE, Ranks, Spectrum, decompose, full_ranks
from lightning_light.measure.latency_table import LatencyTable, measured_text

__all__ = ["FactorizationPlan", "FactorizedLayer", "Goal", "Planner", "require_reachable", "unreachable"]

Evidence = Mapping[str, Mapping[str, Tensor]]
Probe = Callable[[FactorizableLayer, Spectrum, Ranks], float]
Timer = Callable[[FactorizableLayer, str, Ranks], float]
Price = Callable[[float, float], Any]
"""Multiply-accumulates and number of weights -> what the budget counts; also of whole arrays."""

_SAME = 1e-12
_TIMED_CHOICES = 8  # per layer, for a budget of latency


@dataclass(frozen=True)
class Goal:
    """What one event of a factorization is to reach.

    Attributes:
        budget: the quantity that is limited, or a rule for the ranks of each layer.
        current: the quantity of the whole network as it is.
        limit: its upper limit after this event.
        final: its upper limit after the last event of the run.
        price: cost of a layer from its multiply-accumulates and weights; None if layers have to be timed.
        table: for a budget of latency in a runtime.
    """

    budget: Budget | RankRule
    current: float
    limit: float
    final: float
    price: Price | None
    table: LatencyTable | None = None

    @property
    def rule(self) -> RankRule | None:
        """The rule, if there is no budget."""
        return self.budget if isinstance(self.budget, RankRule) else None

    @property
    def quantity(self) -> str:
        """Name of what is counted; multiply-accumulates under a rule."""
        return MACs.quantity if isinstance(self.budget, RankRule) else self.budget.quantity


@dataclass(frozen=True, eq=False)
class FactorizedLayer:
    """Factors of one layer.

    Attributes:
        form: see `lightning_light.lowrank.spectra.Spectrum`.
        ranks: within a group.
        full: the ranks at which the factors are exact.
        error: fraction of the energy that is lost, in [0, 1], in the norm of the fit.
        macs: before and after, per sample.
        params: number of weights before and after.
        factors: weights of the new layers.
        owner: the attention or fused layer to split first, or an empty string.
        parts: number of parts into which ``owner`` is split.
    """

    form: str
    ranks: Ranks
    full: Ranks
    error: float
    macs: tuple[float, float]
    params: tuple[int, int]
    factors: list[Tensor]
    owner: str = ""
    parts: int = 0


@dataclass(frozen=True, eq=False)
class FactorizationPlan(Tabular):
    """The factors of every layer, and the cost of the network before and after.

    Attributes:
        layers: name -> factors.
        skipped: name -> why the layer stays dense.
        final_forms: name -> form of every layer that is factorized at the end of the run.
        quantity: what is counted, as in the ``quantity`` of a `Budget`.
        before: of the whole network as it is.
        after: of the whole network with the plan applied.
        estimated: ``after`` as it was estimated, where the written file was measured.
    """

    layers: dict[str, FactorizedLayer] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    final_forms: dict[str, str] = field(default_factory=dict)
    quantity: str = "macs"
    before: float = 0.0
    after: float = 0.0
    estimated: float | None = None

    @property
    def entry(self) -> dict[str, Any]:
        """Return what the edit log records, the layers to split and the form and ranks of each layer."""
        owners = {layer.owner: layer.parts for layer in self.layers.values() if layer.owner}
        return {
            "op": OPERATION,
            "split": [[name, parts] for name, parts in owners.items()],
            "layers": [[name, layer.form, list(layer.ranks)] for name, layer in self.layers.items()],
        }

    def lines(self) -> list[str]:
        """Return one line per layer: its factors, or why it stays dense."""
        factorized = [
            f"{name}: {layer.form}, rank {_product(layer.ranks)} of {_product(layer.full)}, energy kept "
            f"{1 - layer.error:.4f}, MACs {layer.macs[0]:.4g} -> {layer.macs[1]:.4g}, "
            f"weights {layer.params[0]} -> {layer.params[1]}"
            for name, layer in self.layers.items()
        ]
        return factorized + [f"{name}: dense, {reason}" for name, reason in self.skipped.items()]

    def summary(self) -> str:
        """Return one line for the whole network."""
        count = len(self.layers) + len(self.skipped)
        cost = f"{self.quantity} {human_count(self.before)} → {human_count(self.after)}"
        file = measured_text(self.after, self.estimated)
        return f"factorized {len(self.layers)} of {count} layers, {file}{cost}"

    @override
    def tables(self) -> list[DataTable]:
        """Return one line per layer."""
        return [layer_lines(self.lines(), self.summary())]


def require_reachable(layers: Sequence[FactorizableLayer], allocation: RankAllocation, goal: Goal) -> None:
    """Refuse a budget that is below the cost of all layers at their lowest ranks, from shapes alone.

    Raises:
        BudgetError: the final limit cannot be reached.
    """
    if goal.rule is None and goal.price is not None:
        saved = sum(_largest_saving(layer, allocation, goal.price) for layer in layers)
        if goal.current - saved > goal.final * (1 + _SAME):
            raise unreachable(goal, goal.final, goal.current - saved, len(layers))


@dataclass(frozen=True, eq=False)
class Planner:
    """Choose the form and the ranks of every layer; each weight is decomposed once.

    Args:
        layers: those that can be factorized.
        reasons: name -> reason of those that cannot.
        options: of the factorization.
        goal: of this event.
        timer: seconds of a layer in a form at ranks, or of the dense layer for the form ``""``.
        evidence: layer name -> kind -> what the fit needs.
        probe: change of the network's output with one layer factorized.
        known_faster: layers that ``faster_only`` has accepted at an earlier event.
    """

    layers: Sequence[FactorizableLayer]
    reasons: Mapping[str, str]
    options: FactorizationOptions
    goal: Goal
    timer: Timer
    evidence: Evidence = field(default_factory=dict)
    probe: Probe | None = None
    known_faster: Collection[str] = ()
    _spectra: dict[tuple[str, str], Spectrum] = field(default_factory=dict)
    _sensitivities: dict[str, float] = field(default_factory=dict)

    def plan(self) -> FactorizationPlan:
        """Plan an event.

        The end of the run is planned first, so that an unreachable budget is refused before the first event. An earlier
        event takes only forms of that plan, from which the end can be reached by lowering ranks.

        Raises:
            BudgetError: the final limit is below the cost at the lowest ranks.
        """
        goal, found = self.goal, {layer.name: self._front(layer) for layer in self.layers}
        skipped = {**self.reasons, **{name: front for name, front in found.items() if isinstance(front, str)}}
        fronts = {name: front for name, front in found.items() if not isinstance(front, str)}
        able = {layer.name: layer for layer in self.layers if layer.name in fronts}
        while True:
            final = self._choose(able, fronts, goal.final)
            slower = self._slower(able, final) if self.options.allocation.faster_only else {}
            if not slower:
                break
            skipped |= slower
            able = {name: layer for name, layer in able.items() if name not in slower}
        chosen = final
        if goal.limit > goal.final:
            forms = {name: {"", choice.form} for name, choice in final.items()}
            allowed = {name: [choice for choice in fronts[name] if choice.form in forms[name]] for name in able}
            chosen = self._choose(able, allowed, goal.limit)
        reason = "the budget is met without it"
        if goal.rule is not None:
            reason = "its factors would not be smaller at the rule's ranks"
        skipped |= {name: reason for name, choice in chosen.items() if not choice.form}
        forms_at_end = {name: choice.form for name, choice in final.items() if choice.form}
        return replace(self._planned(able, chosen), skipped=skipped, final_forms=forms_at_end)

    def fastest(self) -> FactorizationPlan:
        """Choose the form and the ranks of every layer that cost the least."""
        fronts = ((layer, self._front(layer)) for layer in self.layers)
        chosen = {layer.name: front[0] for layer, front in fronts if not isinstance(front, str)}
        return self._planned({layer.name: layer for layer in self.layers}, chosen)

    def _planned(self, able: Mapping[str, FactorizableLayer], chosen: Mapping[str, Choice]) -> FactorizationPlan:
        saved = sum(self._dense(able[name]).cost - choice.cost for name, choice in chosen.items())
        factorized = {name: self._factorized(able[name], choice) for name, choice in chosen.items() if choice.form}
        before = self.goal.current
        return FactorizationPlan(factorized, quantity=self.goal.quantity, before=before, after=before - saved)

    def _front(self, layer: FactorizableLayer) -> list[Choice] | str:
        """Return the layer's choices in ascending cost, or why there are none."""
        dense = self._dense(layer)
        if self.goal.rule is None and not dense.cost:
            return f"it has no {self.goal.quantity} to save"
        choices = [choice for form in self._forms(layer) for choice in self._choices(layer, form, dense)]
        if not choices:
            return "factors of the lowest rank allowed would not be smaller"
        if self.goal.price is None:
            choices = self._timed(layer, frontier(choices), dense)
            if not choices:
                return "its factors do not run faster on this machine"
        return frontier([*choices, dense])

    def _choose(
        self, able: Mapping[str, FactorizableLayer], fronts: Mapping[str, list[Choice]], limit: float
    ) -> dict[str, Choice]:
        """Choose one of its choices for every layer, within ``limit`` for the whole network."""
        if self.goal.rule is not None:
            return {name: self._by_rule(layer, self.goal.rule) for name, layer in able.items()}
        names = list(able)
        fixed = self.goal.current - sum(self._dense(able[name]).cost for name in names)
        weights = [self._sensitivity(able[name], fronts[name]) for name in names]
        found = allocate([fronts[name] for name in names], limit - fixed, weights)
        if found is None:
            lowest = fixed + sum(fronts[name][0].cost for name in names)
            raise unreachable(self.goal, limit, lowest, len(names))
        return dict(zip(names, found, strict=True))

    def _slower(self, able: Mapping[str, FactorizableLayer], chosen: Mapping[str, Choice]) -> dict[str, str]:
        """Return name -> reason of the dense layers whose chosen factors do not run faster."""
        reasons = {}
        for name, choice in chosen.items():
            if not choice.form or choice.form == "embedding" or able[name].limits or name in self.known_faster:
                continue
            before = self.timer(able[name], "", ())
            after = self.timer(able[name], choice.form, choice.ranks)
            if after >= before:
                reasons[name] = (
                    f"its factors ({choice.form}, rank {_product(choice.ranks)}) took {after * 1e6:.0f} us on this "
                    f"machine, the layer itself {before * 1e6:.0f} us"
                )
        return reasons

    def _factorized(self, layer: FactorizableLayer, choice: Choice) -> FactorizedLayer:
        """Compute the factors of a choice."""
        spectrum, dense = self._spectrum(layer, choice.form), self._dense(layer)
        return FactorizedLayer(
            form=choice.form,
            ranks=choice.ranks,
            full=spectrum.full,
            error=choice.error,
            macs=(dense.macs, choice.macs),
            params=(dense.params, choice.params),
            factors=spectrum.factors(choice.ranks),
            owner=layer.owner,
            parts=layer.parts,
        )

    def _dense(self, layer: FactorizableLayer) -> Choice:
        """Return the choice that leaves the layer unchanged."""
        ranks = layer.limits or ()
        macs, params = layer.current_cost
        choice = self._priced("", ranks, macs, params, 0.0)
        is_timed = self.goal.price is None and layer.forms != ("embedding",)
        return replace(choice, cost=self.timer(layer, "", ())) if is_timed else choice

    def _by_rule(self, layer: FactorizableLayer, rule: RankRule) -> Choice:
        """Return the cheapest form at the ranks of the rule."""
        probe = self.probe
        dense = self._dense(layer)
        found = [dense]
        for form in self._forms(layer):
            spectrum = self._spectrum(layer, form)
            measure = None if probe is None else lambda ranks, s=spectrum: probe(layer, s, ranks)
            ranks = tuple(max(rank, self.options.allocation.min_rank) for rank in rule(spectrum, measure))
            ranks = rounded(ranks, layer.limits or spectrum.full, _step(self.options.allocation, form))
            choice = self._priced(form, ranks, *layer.cost(form, ranks), spectrum.error(ranks))
            if _is_smaller(choice, dense):
                found.append(choice)
        return min(found, key=lambda choice: (choice.macs, choice.params, choice.error))

    def _sensitivity(self, layer: FactorizableLayer, front: list[Choice]) -> float:
        """Return the weight of the layer's error: the output's change per unit of error, at a middle choice."""
        if self.probe is None or self.options.allocation.importance == "equal":
            return 1.0
        if layer.name not in self._sensitivities:
            choice = front[max((len(front) - 1) // 2 - 1, 0)]
            change = self.probe(layer, self._spectrum(layer, choice.form), choice.ranks)
            self._sensitivities[layer.name] = max(change, 1e-12) / max(choice.error, 1e-12)
        return self._sensitivities[layer.name]

    def _spectrum(self, layer: FactorizableLayer, form: str) -> Spectrum:
        key = layer.name, form
        if key not in self._spectra:
            is_weighted = form in {"linear", "channel"} and layer.name in self.evidence
            metric = self.options.fit.metric(self.evidence[layer.name]) if is_weighted else None
            self._spectra[key] = decompose(form, layer.weight, metric)
        return self._spectra[key]

    def _forms(self, layer: FactorizableLayer) -> tuple[str, ...]:
        """Return the forms to compare; with evidence only one, as errors in different norms do not compare."""
        is_weighted = self.options.fit.needs and "channel" in layer.forms and len(layer.forms) > 1
        return ("channel",) if is_weighted else layer.forms

    def _priced(self, form: str, ranks: Ranks, macs: float, params: int, error: float) -> Choice:
        price = self.goal.price
        return Choice(form, ranks, macs, params, macs if price is None else price(macs, params), error)

    def _choices(self, layer: FactorizableLayer, form: str, dense: Choice) -> list[Choice]:
        spectrum = self._spectrum(layer, form)
        steps = [self._steps(form, full) for full in (layer.limits or spectrum.full)]
        if len(steps) == 2:
            return self._tucker_choices(layer, spectrum, steps, dense)
        errors = spectrum.relative_errors().tolist()
        found = (self._priced(form, (rank,), *layer.cost(form, (rank,)), errors[rank - 1]) for rank in steps[0])
        return list(takewhile(lambda choice: _is_smaller(choice, dense), found))  # higher ranks only cost more

    def _tucker_choices(
        self, layer: FactorizableLayer, spectrum: Spectrum, steps: list[list[int]], dense: Choice
    ) -> list[Choice]:
        """Return those pairs of ranks that may lie on the frontier."""
        inputs, outputs = np.array(steps[0])[:, None], np.array(steps[1])[None]
        kernel_size = math.prod(layer.weight.shape[3:])
        grid: Any = layer.cost  # plain arithmetic, so it takes whole arrays too
        macs, params = grid("tucker2", (inputs, outputs))
        smaller = (macs < dense.macs) & (params < dense.params)
        useful = (inputs <= outputs * kernel_size) & (outputs <= inputs * kernel_size)  # higher ranks gain nothing
        good = smaller & useful
        errors = spectrum.relative_errors().cpu().numpy()[inputs - 1, outputs - 1][good]
        cost = (macs if self.goal.price is None else self.goal.price(macs, params))[good]
        order = cost.argsort(kind="stable")
        lowest = np.minimum.accumulate(np.concatenate([[math.inf], errors[order]]))
        order = order[errors[order] < lowest[:-1]]
        places = np.argwhere(good)[order].tolist()
        columns = (column[good][order].tolist() for column in (macs, params))
        return [
            self._priced("tucker2", (steps[0][i], steps[1][o]), macs, params, error)
            for (i, o), macs, params, error in zip(places, *columns, errors[order].tolist(), strict=True)
        ]

    def _steps(self, form: str, full: int) -> list[int]:
        """Return the ranks to try: multiples of ``round_to``, and the full rank."""
        allocation = self.options.allocation
        return [*range(_lowest_rank(allocation, form, full), full, _step(allocation, form)), full]

    def _timed(self, layer: FactorizableLayer, choices: list[Choice], dense: Choice) -> list[Choice]:
        """Time a few evenly spread choices, and return those that run faster than the layer."""
        count = min(_TIMED_CHOICES, len(choices))
        picked = [choices[round(i * (len(choices) - 1) / max(count - 1, 1))] for i in range(count)]
        timed = [replace(choice, cost=self.timer(layer, choice.form, choice.ranks)) for choice in dict.fromkeys(picked)]
        return [choice for choice in timed if choice.cost < dense.cost]


def _step(allocation: RankAllocation, form: str) -> int:
    """Return what ranks are multiples of: with a depthwise layer, any rank is a multiple of the channels."""
    return 1 if form in DEPTHWISE else allocation.round_to


def _lowest_rank(allocation: RankAllocation, form: str, full: int) -> int:
    step = _step(allocation, form)
    return min(math.ceil(allocation.min_rank / step) * step, full)


def _largest_saving(layer: FactorizableLayer, allocation: RankAllocation, price: Price) -> float:
    """Return what the cheapest factors of a layer save, or 0."""
    dense = layer.current_cost
    savings = [0.0]
    for form in layer.forms:
        limits = layer.limits or full_ranks(form, layer.weight.shape)
        macs, params = layer.cost(form, tuple(_lowest_rank(allocation, form, limit) for limit in limits))
        if params < dense[1] and (macs < dense[0] or form == "embedding"):
            savings.append(price(*dense) - price(macs, params))
    return max(savings)


def unreachable(goal: Goal, limit: float, lowest: float, count: int) -> BudgetError:
    """Return the error that ``lowest``, with ``count`` layers at their lowest ranks, is above ``limit``."""
    return BudgetError(
        f"`{goal.budget!r}`: expected {goal.quantity} of at most {limit:.6g}, found {lowest:.6g} when all "
        f"{count} layers that can be factorized have their lowest ranks (now {goal.current:.6g}). Give a larger "
        "budget, widen `targets`, or lower `min_rank` and `round_to`."
    )


def _is_smaller(choice: Choice, dense: Choice) -> bool:
    cheaper = choice.macs < dense.macs or choice.form == "embedding"
    return choice.params < dense.params and cheaper


def _product(ranks: Ranks) -> str:
    return "x".join(map(str, ranks))
