"""Decide for the whole network which layers become factors, of which form and ranks; then it can be done."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, Literal

import numpy as np
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
        found = desk.front(layer)
        if isinstance(found, str):
            skipped[layer.name] = found
        else:
            fronts[layer.name] = found
    able = {layer.name: layer for layer in layers if layer.name in fronts}
    while True:
        chosen = _choose(desk, able, fronts, budget, now, limit, probe, by_output)
        slower = desk.slower(able, chosen) if options.faster_only else {}
        if not slower:
            break
        skipped |= slower
        able = {name: layer for name, layer in able.items() if name not in slower}
    saved = sum(desk.as_it_is(able[name]).cost - choice.cost for name, choice in chosen.items())
    why = "the budget is met without it" if budget else "at the ranks of the rule its factors would not be smaller"
    skipped |= {name: why for name, choice in chosen.items() if not choice.form}
    done = {name: desk.factored(able[name], choice) for name, choice in chosen.items() if choice.form}
    return Plan(done, skipped, quantity, now, now - saved)


def _choose(
    desk: _Desk,
    able: Mapping[str, Layer],
    fronts: Mapping[str, list[Choice]],
    budget: Budget | None,
    now: float,
    limit: float,
    probe: Callable[[Layer, Spectrum, Ranks], float] | None,
    by_output: bool,
) -> dict[str, Choice]:
    if budget is None:
        return {name: desk.by_rule(layer, probe) for name, layer in able.items()}
    names = list(able)
    rest = now - sum(desk.as_it_is(able[name]).cost for name in names)
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
            metric = self._options.fit.metric(self._evidence[layer.name]) if weighed else None
            self._spectra[key] = decompose(form, layer.weight, metric)
        return self._spectra[key]

    def front(self, layer: Layer) -> list[Choice] | str:
        """The layer's choices, ascending in cost; or why there is nothing to choose."""
        dense = self.as_it_is(layer)
        if layer.forms == ("embedding",) and self._quantity in {"macs", "seconds"} and self._options.rule is None:
            return f"an embedding costs no {self._quantity} as it is"
        choices = [choice for form in self._forms(layer) for choice in self._choices(layer, form, dense)]
        if not choices:
            return "factors of the lowest rank allowed would not be smaller"
        if self._quantity == "seconds":
            choices = self._timed(layer, frontier(choices), dense)
            if not choices:
                return "its factors do not run faster on this machine"
        return frontier([*choices, dense])

    def by_rule(self, layer: Layer, probe: Callable[[Layer, Spectrum, Ranks], float] | None) -> Choice:
        """The cheapest form, at the ranks that the rule says."""
        assert self._options.rule is not None  # or there is a budget
        dense = self.as_it_is(layer)
        found = [dense]
        for form in self._forms(layer):
            spectrum = self.spectrum(layer, form)
            measure = None if probe is None else lambda ranks, s=spectrum: probe(layer, s, ranks)
            ranks = self._options.rule(spectrum, measure)
            ranks = tuple(max(rank, self._options.min_rank) for rank in ranks)
            ranks = rounded(ranks, layer.limits or spectrum.full, self._options.round_to)
            choice = self._priced(form, ranks, *layer.cost(form, ranks), spectrum.error(ranks))
            if self._is_smaller(choice, dense):
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
        spectrum, dense = self.spectrum(layer, choice.form), self.as_it_is(layer)
        return Factored(
            choice.form,
            choice.ranks,
            spectrum.full,
            choice.error,
            (dense.macs, choice.macs),
            (dense.params, choice.params),
            spectrum.factors(choice.ranks),
            layer.owner,
            layer.blocks,
        )

    def _forms(self, layer: Layer) -> tuple[str, ...]:
        """With evidence only the forms that can use it: errors in different norms do not compare."""
        weighed = self._options.fit.needs and "channel" in layer.forms and len(layer.forms) > 1
        return ("channel",) if weighed else layer.forms

    def as_it_is(self, layer: Layer) -> Choice:
        """The layer unchanged."""
        ranks = layer.limits or ()
        macs, params = layer.cost(layer.forms[0], ranks) if ranks else (layer.macs, layer.weight.numel())
        choice = self._priced("", ranks, macs, params, 0.0)
        return replace(choice, cost=self._timer(layer, "", ())) if self._quantity == "seconds" else choice

    def _priced(self, form: str, ranks: Ranks, macs: float, params: int, error: float) -> Choice:
        costs = {"params": float(params), "bytes": float(params * self._bytes)}
        return Choice(form, ranks, macs, params, costs.get(self._quantity, macs), error)

    def _choices(self, layer: Layer, form: str, dense: Choice) -> list[Choice]:
        spectrum = self.spectrum(layer, form)
        steps = [self._steps(full) for full in (layer.limits or spectrum.full)]
        if len(steps) == 2:
            return self._tucker(layer, spectrum, steps, dense)
        shares = spectrum.shares().tolist()
        found = (self._priced(form, (rank,), *layer.cost(form, (rank,)), shares[rank - 1]) for rank in steps[0])
        return list(takewhile(lambda choice: self._is_smaller(choice, dense), found))  # the next one only costs more

    def _tucker(self, layer: Layer, spectrum: Spectrum, steps: list[list[int]], dense: Choice) -> list[Choice]:
        """Of the grid of both ranks only what may lie on the frontier."""
        inputs, outputs = np.array(steps[0])[:, None], np.array(steps[1])[None]
        feature_layers = math.prod(layer.weight.shape[3:])
        grid: Any = layer.cost  # arithmetic alone, so of whole arrays too
        macs, params = grid("tucker2", (inputs, outputs))
        good = (macs < dense.macs) & (params < dense.params)
        good &= (inputs <= outputs * feature_layers) & (
            outputs <= inputs * feature_layers
        )  # beyond that a rank adds nothing
        errors = spectrum.shares().cpu().numpy()[inputs - 1, outputs - 1][good]
        cost = (macs if self._quantity in {"macs", "seconds"} else params)[good]
        order = cost.argsort(kind="stable")
        least = np.minimum.accumulate(np.concatenate([[math.inf], errors[order]]))
        order = order[errors[order] < least[:-1]]
        places = np.argwhere(good)[order].tolist()
        columns = zip(
            places, *(column[good][order].tolist() for column in (macs, params)), errors[order].tolist(), strict=True
        )
        return [
            self._priced("tucker2", (steps[0][i], steps[1][o]), macs, params, error)
            for (i, o), macs, params, error in columns
        ]

    def _steps(self, full: int) -> list[int]:
        """The ranks that are tried: multiples of ``round_to``, and the full rank where it is none."""
        first = math.ceil(self._options.min_rank / self._options.round_to) * self._options.round_to
        return [*range(first, full, self._options.round_to), full]

    def _is_smaller(self, choice: Choice, dense: Choice) -> bool:
        cheaper = choice.macs < dense.macs or choice.form == "embedding"
        return choice.params < dense.params and cheaper

    def _timed(self, layer: Layer, choices: list[Choice], dense: Choice) -> list[Choice]:
        """At most a few choices, evenly spread, with measured costs; only those that are faster than the layer."""
        count = min(_TIMED, len(choices))
        picked = [choices[round(i * (len(choices) - 1) / max(count - 1, 1))] for i in range(count)]
        timed = [
            replace(choice, cost=self._timer(layer, choice.form, choice.ranks)) for choice in dict.fromkeys(picked)
        ]
        return [choice for choice in timed if choice.cost < dense.cost]


def _product(ranks: Ranks) -> str:
    return "x".join(map(str, ranks))
