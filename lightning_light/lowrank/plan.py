"""Decide for the whole network which layers become factors, of which form and ranks; then it can be done."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Literal

import torch
from torch import Tensor

from lightning_light.budgets import Budget
from lightning_light.errors import BudgetError
from lightning_light.lowrank.allocate import Choice, allocate, frontier
from lightning_light.lowrank.fits import Fit
from lightning_light.lowrank.layers import Layer
from lightning_light.lowrank.ranks import RankRule, rounded
from lightning_light.lowrank.spectra import Ranks, Spectrum, decompose

__all__ = ["Factored", "Form", "Options", "Plan", "plan_factors"]

Form = Literal["auto", "channel", "spatial", "tucker2"]
Evidence = Mapping[str, Mapping[str, Tensor]]
Timer = Callable[[Layer, str, Ranks], float]
"""Seconds of a layer in a form, or as it is for the form ``""``."""

_TIMED = 8  # choices of a layer that are timed for a budget of latency


@dataclass(frozen=True)
class Options:
    """How layers are factored.

    Attributes:
        fit: which low-rank matrix is the nearest.
        rule: how many ranks each layer keeps, where there is no budget.
        round_to: ranks are multiples of it.
        min_rank: what every layer keeps at least.
        faster_only: leave a layer alone whose factors do not run faster here and now.
    """

    fit: Fit
    rule: RankRule | None
    round_to: int
    min_rank: int
    faster_only: bool


@dataclass(frozen=True, eq=False)
class Factored:
    """What one layer becomes.

    Attributes:
        form: see `lightning_light.lowrank.spectra.Spectrum`.
        ranks: within a group.
        full: the ranks at which nothing would be lost.
        error: share of the energy that is lost, in [0, 1], in the norm of the fit.
        macs: before and after, for one sample.
        params: weights before and after.
        factors: the weights of the new layers.
        owner: the attention or fused layer that has to be opened first, or an empty string.
        blocks: in how many parts a fused layer falls.
    """

    form: str
    ranks: Ranks
    full: Ranks
    error: float
    macs: tuple[float, float]
    params: tuple[int, int]
    factors: list[Tensor]
    owner: str = ""
    blocks: int = 0


@dataclass(frozen=True, eq=False)
class Plan:
    """What is to be done to a network.

    Attributes:
        layers: name -> what it becomes.
        skipped: name -> why it stays as it is.
        quantity: what the budget counts; ``"macs"`` without one.
        before: the whole network's, as it is.
        after: the whole network's, once the plan is carried out.
    """

    layers: dict[str, Factored] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    quantity: str = "macs"
    before: float = 0.0
    after: float = 0.0

    def lines(self) -> list[str]:
        """One line a layer: what it becomes, or why not."""
        done = [
            f"{name}: {found.form}, rank {_product(found.ranks)} of {_product(found.full)}, energy kept "
            f"{1 - found.error:.4f}, MACs {found.macs[0]:.4g} -> {found.macs[1]:.4g}, "
            f"weights {found.params[0]} -> {found.params[1]}"
            for name, found in self.layers.items()
        ]
        return done + [f"{name}: left alone, {why}" for name, why in self.skipped.items()]


def plan_factors(
    layers: Sequence[Layer],
    reasons: Mapping[str, str],
    options: Options,
    *,
    budget: Budget | None,
    now: float,
    limit: float,
    evidence: Evidence,
    timer: Timer,
    probe: Callable[[Layer, Spectrum, Ranks], float] | None = None,
    by_output: bool = False,
    bytes_each: int = 4,
) -> Plan:
    """Choose form and ranks of every layer.

    Args:
        layers: those that can be factored.
        reasons: why others cannot.
        options: how.
        budget: what counts; without one ``options.rule`` decides layer by layer.
        now: the whole network's quantity.
        limit: what it may be.
        evidence: layer name -> kind -> what the fit needs.
        timer: measures layers, for a budget of latency and for ``faster_only``.
        probe: measures how much the network's output changes with one layer factored.
        by_output: weigh the layers' errors by what ``probe`` says of them.
        bytes_each: of one weight, for a budget of size.

    Raises:
        BudgetError: the limit is below what the lowest ranks cost.
    """
    quantity = "macs" if budget is None else budget.quantity
    desk = _Desk(options, quantity, evidence, timer, bytes_each)
    skipped = dict(reasons)
    fronts: dict[str, list[Choice]] = {}
    for layer in layers:
        fronts[layer.name], why = desk.front(layer)
        if why:
            skipped[layer.name] = why
    able = {layer.name: layer for layer in layers if len(fronts[layer.name]) > 1}
    while True:
        chosen = _choose(desk, able, fronts, budget, now, limit, probe, by_output)
        slower = desk.slower(able, chosen) if options.faster_only else {}
        if not slower:
            break
        skipped |= slower
        able = {name: layer for name, layer in able.items() if name not in slower}
    saved = sum(fronts[name][-1].cost - choice.cost for name, choice in chosen.items())
    why = "the budget is met without it" if budget else "at the ranks of the rule its factors would not be smaller"
    skipped |= {name: why for name, choice in chosen.items() if not choice.form}
    done = {name: desk.factored(able[name], choice) for name, choice in chosen.items() if choice.form}
    return Plan(done, skipped, quantity, now, now - saved)


def _choose(
    desk: _Desk, able: Mapping[str, Layer], fronts: Mapping[str, list[Choice]], budget: Budget | None, now: float,
    limit: float, probe: Callable[[Layer, Spectrum, Ranks], float] | None, by_output: bool,
) -> dict[str, Choice]:  # fmt: skip
    if budget is None:
        return {name: desk.by_rule(layer, fronts[name], probe) for name, layer in able.items()}
    names = list(able)
    rest = now - sum(fronts[name][-1].cost for name in names)
    weights = None
    if by_output:
        assert probe is not None  # the callback asks for calibration batches
        weights = [desk.sensitivity(able[name], fronts[name], probe) for name in names]
    found = allocate([fronts[name] for name in names], limit - rest, weights)
    if found is None:
        least = rest + sum(fronts[name][0].cost for name in names)
        raise BudgetError(
            f"`{budget!r}`: expected {budget.quantity} of at most {limit:.6g}, found {least:.6g} when all "
            f"{len(names)} layers that can be factored have their lowest ranks (now {now:.6g}). Give a larger budget, "
            "widen `targets`, or lower `min_rank` and `round_to`."
        )
    return dict(zip(names, found, strict=True))


class _Desk:
    """Decompositions, each done once, and what is read from them."""

    def __init__(self, options: Options, quantity: str, evidence: Evidence, timer: Timer, bytes_each: int) -> None:
        self._options, self._quantity, self._evidence, self._timer = options, quantity, evidence, timer
        self._bytes = bytes_each
        self._spectra: dict[tuple[str, str], Spectrum] = {}

    def spectrum(self, layer: Layer, form: str) -> Spectrum:
        key = layer.name, form
        if key not in self._spectra:
            weighed = form in {"linear", "channel"} and layer.name in self._evidence
            weights = self._options.fit.weights(self._evidence[layer.name]) if weighed else None
            self._spectra[key] = decompose(form, layer.weight, weights)
        return self._spectra[key]

    def front(self, layer: Layer) -> tuple[list[Choice], str]:
        """The layer's choices, itself last; and why there is nothing to choose."""
        dense = self._as_it_is(layer)
        if layer.forms == ("embedding",) and self._quantity in {"macs", "seconds"} and self._options.rule is None:
            return [dense], f"an embedding costs no {self._quantity} as it is"
        choices = [choice for form in self._forms(layer) for choice in self._choices(layer, form, dense)]
        if not choices:
            return [dense], "factors of the lowest rank allowed would not be smaller"
        if self._quantity == "seconds":
            choices, dense = self._timed(layer, frontier(choices), dense)
            if not choices:
                return [dense], "its factors do not run faster on this machine"
        return frontier([*choices, dense]), ""

    def by_rule(
        self, layer: Layer, front: list[Choice], probe: Callable[[Layer, Spectrum, Ranks], float] | None
    ) -> Choice:
        """The cheapest form, at the ranks that the rule says."""
        assert self._options.rule is not None  # or there is a budget
        found = [front[-1]]
        for form in self._forms(layer):
            spectrum = self.spectrum(layer, form)
            measure = None if probe is None else lambda ranks, s=spectrum: probe(layer, s, ranks)
            ranks = self._options.rule(spectrum, measure)
            ranks = tuple(max(rank, self._options.min_rank) for rank in ranks)
            ranks = rounded(ranks, layer.limits or spectrum.full, self._options.round_to)
            choice = self._choice(layer, form, ranks)
            if self._is_smaller(choice, front[-1]):
                found.append(choice)
        return min(found, key=lambda choice: (choice.macs, choice.params))

    def sensitivity(self, layer: Layer, front: list[Choice], probe: Callable[[Layer, Spectrum, Ranks], float]) -> float:
        """How much the output changes for one unit of the layer's error, asked in the middle of its choices."""
        choice = front[max((len(front) - 1) // 2 - 1, 0)]
        change = probe(layer, self.spectrum(layer, choice.form), choice.ranks)
        return max(change, 1e-12) / max(choice.error, 1e-12)

    def slower(self, able: Mapping[str, Layer], chosen: Mapping[str, Choice]) -> dict[str, str]:
        """The chosen layers whose factors take longer than they do."""
        reasons = {}
        for name, choice in chosen.items():
            if choice.form and choice.form != "embedding":
                before = self._timer(able[name], "", ())
                after = self._timer(able[name], choice.form, choice.ranks)
                if after >= before:
                    reasons[name] = (
                        f"its factors ({choice.form}, rank {_product(choice.ranks)}) took {after * 1e6:.0f} us here, "
                        f"the layer itself {before * 1e6:.0f} us"
                    )
        return reasons

    def factored(self, layer: Layer, choice: Choice) -> Factored:
        """The factors themselves."""
        spectrum, dense = self.spectrum(layer, choice.form), self._as_it_is(layer)
        return Factored(
            choice.form, choice.ranks, spectrum.full, choice.error, (dense.macs, choice.macs),
            (dense.params, choice.params), spectrum.factors(choice.ranks), layer.owner, layer.blocks,
        )  # fmt: skip

    def _forms(self, layer: Layer) -> tuple[str, ...]:
        """With evidence only the forms that can use it: errors in different norms do not compare."""
        weighed = self._options.fit.needs and "channel" in layer.forms and len(layer.forms) > 1
        return ("channel",) if weighed else layer.forms

    def _as_it_is(self, layer: Layer) -> Choice:
        if layer.limits is None:
            return self._with_cost(Choice("", (), layer.macs, layer.weight.numel(), 0.0, 0.0))
        macs, params = layer.cost(layer.forms[0], layer.limits)
        return self._with_cost(Choice("", layer.limits, macs, params, 0.0, 0.0))

    def _with_cost(self, choice: Choice) -> Choice:
        costs = {"macs": choice.macs, "params": float(choice.params), "bytes": float(choice.params * self._bytes)}
        return replace(choice, cost=costs.get(self._quantity, choice.macs))

    def _choice(self, layer: Layer, form: str, ranks: Ranks) -> Choice:
        macs, params = layer.cost(form, ranks)
        return self._with_cost(Choice(form, ranks, macs, params, 0.0, self.spectrum(layer, form).error(ranks)))

    def _choices(self, layer: Layer, form: str, dense: Choice) -> list[Choice]:
        spectrum = self.spectrum(layer, form)
        steps = [self._steps(full) for full in (layer.limits or spectrum.full)]
        if len(steps) == 2:
            return self._tucker(layer, spectrum, steps, dense)
        found = (self._choice(layer, form, (rank,)) for rank in steps[0])
        return list(takewhile(lambda choice: self._is_smaller(choice, dense), found))  # the next one only costs more

    def _tucker(self, layer: Layer, spectrum: Spectrum, steps: list[list[int]], dense: Choice) -> list[Choice]:
        """Of the grid of both ranks only what may lie on the frontier."""
        inputs, outputs = (axis.flatten() for axis in torch.meshgrid(*map(torch.tensor, steps), indexing="ij"))
        errors = spectrum.errors()[inputs - 1, outputs - 1]
        macs, params = layer.costs_of_grid(inputs, outputs)
        taps = math.prod(layer.weight.shape[3:])
        good = (macs < dense.macs) & (params < dense.params)
        good &= (inputs <= outputs * taps) & (outputs <= inputs * taps)  # beyond that a rank adds nothing
        order = (macs if self._quantity in {"macs", "seconds"} else params).argsort()
        found, least = [], math.inf
        for place in order[good[order]].tolist():
            if errors[place] < least:
                least = float(errors[place])
                found.append(self._choice(layer, "tucker2", (int(inputs[place]), int(outputs[place]))))
        return found

    def _steps(self, full: int) -> list[int]:
        """The ranks that are tried: multiples of ``round_to``, and the full rank where it is none."""
        first = math.ceil(self._options.min_rank / self._options.round_to) * self._options.round_to
        return [*range(first, full, self._options.round_to), full]

    def _is_smaller(self, choice: Choice, dense: Choice) -> bool:
        cheaper = choice.macs < dense.macs or choice.form == "embedding"
        return choice.params < dense.params and cheaper

    def _timed(self, layer: Layer, choices: list[Choice], dense: Choice) -> tuple[list[Choice], Choice]:
        """At most a few choices, evenly spread, with measured costs; only those that are faster than the layer."""
        count = min(_TIMED, len(choices))
        picked = [choices[round(i * (len(choices) - 1) / max(count - 1, 1))] for i in range(count)]
        dense = replace(dense, cost=self._timer(layer, "", ()))
        timed = [
            replace(choice, cost=self._timer(layer, choice.form, choice.ranks)) for choice in dict.fromkeys(picked)
        ]
        return [choice for choice in timed if choice.cost < dense.cost], dense


def _product(ranks: Ranks) -> str:
    return "x".join(map(str, ranks))
