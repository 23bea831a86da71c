"""Find the convolutions that can be replaced, and what each operator in their places would cost."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_light.budgets import Budget, Latency
from lightning_light.errors import BudgetError
from lightning_light.example_input import ExampleInput
from lightning_light.isolation import FORWARD_ERRORS, has_hooks, isolated, observe
from lightning_light.measure.latency_table import LatencyTable
from lightning_light.merging import BranchedLayer
from lightning_light.substitution.operators import Operator
from lightning_light.substitution.options import SubstitutionOptions
from lightning_light.surgery.plain_layers import why_not_plain
from lightning_light.surgery.trial import failing_replacements, temporarily_replaced
from lightning_light.targets import as_targets

__all__ = ["Candidate", "Candidates", "built_operators", "find_candidates", "require_reachable"]


@dataclass(frozen=True)
class Candidate:
    """One operator in the place of one layer.

    Attributes:
        layer: name of the convolution.
        operator: what takes its place.
        cost: by how much it changes the quantity of the budget, below 0.
        error: squared error of the fitted operator on the layer's outputs, relative to their variance.
        score: distance of the network's outputs with it alone.
    """

    layer: str
    operator: Operator
    cost: float
    error: float = 0.0
    score: float = 0.0


@dataclass(frozen=True)
class Candidates:
    """What may be replaced by what.

    Attributes:
        found: candidates of all layers, in the order of the layers.
        skipped: name of each other targeted convolution -> the reason why it is left alone.
    """

    found: list[Candidate] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> list[str]:
        """Names of the layers that have a candidate."""
        return list(dict.fromkeys(candidate.layer for candidate in self.found))

    def of(self, layer: str) -> list[Candidate]:
        """Return the candidates of a layer."""
        return [candidate for candidate in self.found if candidate.layer == layer]

    def without(self, failing: Mapping[str, str]) -> Candidates:
        """Return the candidates of the other layers; ``failing`` has the reason of each layer that is left alone."""
        found = [candidate for candidate in self.found if candidate.layer not in failing]
        return Candidates(found, {**self.skipped, **failing})


def find_candidates(
    model: nn.Module,
    budget: Budget,
    example: ExampleInput,
    options: SubstitutionOptions,
    *,
    optimizers: Iterable[Any] | None = None,
    table: LatencyTable | None = None,
) -> Candidates:
    """Find the convolutions that can be replaced, and the operators that reduce the quantity of the budget there.

    Args:
        model: left as it is.
        budget: its quantity is measured with one layer replaced at a time.
        example: one call of the model.
        options: which operators and targets.
        optimizers: those that train the model; None where that is not known.
        table: of ``budget``, if its quantity is that of a written file: each operator is timed there.

    Raises:
        TargetError: the targets match no module.
    """
    layers, skipped = _layers(model, example, options, optimizers)
    costs: dict[tuple[Any, ...], float | str] = {}
    found: list[Candidate] = []
    for name, (conv, shape) in layers.items():
        reasons = {}
        for operator in options.candidates:
            key = operator, repr(conv), shape  # equal layers have equal costs
            if key not in costs:
                costs[key] = _cost(model, name, conv, shape, operator, budget, example, table)
            cost = costs[key]
            if isinstance(cost, float):
                found.append(Candidate(name, operator, cost))
            else:
                reasons[repr(operator)] = cost
        if len(reasons) == len(options.candidates):
            skipped[name] = "; ".join(f"{operator}: {reason}" for operator, reason in reasons.items())
    return Candidates(found, skipped)


def built_operators(model: nn.Module, candidates: Candidates) -> dict[str, nn.Module]:
    """Return new layers for each place, of the first operator that can stand there."""
    built = {}
    with isolated(model):  # building draws random numbers
        for name in candidates.layers:
            conv: Any = model.get_submodule(name)
            built[name] = candidates.of(name)[0].operator.build(conv).to(conv.weight)
    return built


def require_reachable(candidates: Candidates, budget: Budget, now: float, goal: float) -> None:
    """Refuse a budget that is out of reach with the cheapest operator in every place.

    Raises:
        BudgetError: with the value that can be reached.
    """
    least = now + sum(min(each.cost for each in candidates.of(layer)) for layer in candidates.layers)
    if least > goal:
        left = "; ".join(f"{name}: {reason}" for name, reason in candidates.skipped.items())
        raise BudgetError(
            f"`{budget!r}` cannot be reached by lighter operators: expected {budget.quantity} <= {goal:.6g}, found "
            f"{least:.6g} with the cheapest operator in each of {len(candidates.layers)} layers. Add lighter ones, "
            f"widen `targets`, or give a milder budget. Left alone: {left or 'nothing'}."
        )


def _layers(
    model: nn.Module, example: ExampleInput, options: SubstitutionOptions, optimizers: Iterable[Any] | None
) -> tuple[dict[str, tuple[nn.Conv2d, torch.Size]], dict[str, str]]:
    """Return the convolutions that can be replaced, with the shapes of their inputs, and why others cannot."""
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BranchedLayer))
    modules = {
        name: module
        for name, module in as_targets(options.targets).select(model).items()
        if isinstance(module, nn.modules.conv._ConvNd) and not isinstance(module, BranchedLayer)
    }
    shapes = _input_shapes(model, modules, example)
    why_not = why_not_plain(model, optimizers)
    layers: dict[str, tuple[nn.Conv2d, torch.Size]] = {}
    skipped: dict[str, str] = {}
    for name, module in modules.items():
        reason = "expanded to branches; merge them first" if name.startswith(inside) else why_not(name, module)
        reason = reason or _why_not_replaced(module, shapes.get(name, []))
        if reason is None and isinstance(module, nn.Conv2d):
            layers[name] = module, shapes[name][0]
        else:
            skipped[name] = reason or ""
    trials = {name: copy.deepcopy(conv) for name, (conv, _) in layers.items()}
    failing = failing_replacements(model, {name: nn.Sequential(conv) for name, conv in trials.items()}, example)
    return {name: layer for name, layer in layers.items() if name not in failing}, skipped | failing


def _why_not_replaced(conv: nn.Module, shapes: list[torch.Size]) -> str | None:
    assert isinstance(conv, nn.Conv2d)  # since it is plain
    if conv.groups > 1:
        return f"it has {conv.groups} groups"
    if set(conv.kernel_size) == {1}:
        return "a 1x1 convolution"
    if not conv.weight.isfinite().all():
        return "its weight is not finite"
    if has_hooks(conv):
        return "it has forward hooks"
    if len(shapes) != 1:
        return f"called {len(shapes)} times per forward pass" if shapes else "not called in a forward pass"
    return None if len(shapes[0]) == 4 else f"its input has {len(shapes[0])} dimensions"


def _input_shapes(
    model: nn.Module, modules: Mapping[str, nn.Module], example: ExampleInput
) -> dict[str, list[torch.Size]]:
    shapes: dict[str, list[torch.Size]] = {}

    def record(name: str, module: nn.Module, args: tuple[Tensor, ...], *_: Any) -> None:
        shapes.setdefault(name, []).append(args[0].shape)

    observe(model, modules, [example], record)
    return shapes


def _cost(
    model: nn.Module,
    name: str,
    conv: nn.Conv2d,
    shape: torch.Size,
    operator: Operator,
    budget: Budget,
    example: ExampleInput,
    table: LatencyTable | None,
) -> float | str:
    """Return by how much ``operator`` in the place of ``conv`` changes the quantity, or why it cannot stand there.

    Latency in PyTorch is measured on the whole network, other quantities on the layer alone.
    """
    if reason := operator.incompatibility(conv):
        return reason
    x = torch.zeros(shape, dtype=conv.weight.dtype, device=conv.weight.device)
    with isolated(model):  # building draws random numbers
        layers: Any = operator.build(conv)
        if not isinstance(layers, nn.Module):
            return f"`build` returned {type(layers).__name__}, not a module"
        layers.to(conv.weight).eval()
        if reason := _other_shape(layers, x, conv(x)):
            return reason
        call = ExampleInput((x,))
        if table is None and isinstance(budget, Latency):
            with temporarily_replaced(model, {name: layers}):
                replaced = budget.measure(model, example)
            cost = replaced - budget.measure(model, example)  # one after the other, on a machine that may be busy
        else:
            part = budget.measure if table is None else table.part
            cost = part(layers, call) - part(conv, call)
    return cost if cost < 0 else f"does not reduce {budget.quantity}"


def _other_shape(layers: nn.Module, x: Tensor, expected: Tensor) -> str | None:
    """Why ``layers``, as of an operator of the user, cannot take the place of a layer with this output."""
    try:
        found = layers(x)
    except FORWARD_ERRORS as error:
        return f"it fails ({type(error).__name__}: {next(iter(str(error).splitlines()), '')})"
    if isinstance(found, Tensor) and found.shape == expected.shape and found.dtype == expected.dtype:
        return None
    return f"its output is not a tensor of the shape {tuple(expected.shape)} and the type {expected.dtype}"
