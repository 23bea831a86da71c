"""Search without a Trainer."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_light.budgets import Budget
from lightning_light.criteria.output_distance import Distance
from lightning_light.errors import TargetError
from lightning_light.example_input import ExampleInput
from lightning_light.export.exporter import Exporter
from lightning_light.nas.apply import apply_items
from lightning_light.nas.choices import Item
from lightning_light.nas.costs import Costs, Meter
from lightning_light.nas.evaluation import Evaluator, split_batches
from lightning_light.nas.options import SearchOptions, Space, check_budgets
from lightning_light.nas.result import SearchResult
from lightning_light.nas.sensitivity import fill_table
from lightning_light.nas.solver import Solver
from lightning_light.nas.table import SearchTable, savings_of
from lightning_light.quantization import quantize
from lightning_light.surgery.attachment import has_state, state_of
from lightning_light.surgery.distributed import digest
from lightning_light.validation import NonNegativeInt, PositiveInt, validated

__all__ = ["check_counts", "find_assignment", "search"]


@validated
def search(
    model: nn.Module,
    example_inputs: Any,
    budget: Budget | Sequence[Budget],
    *,
    data: Iterable[Any],
    space: Space | None = SearchOptions.space,
    runtime: Exporter | None = SearchOptions.runtime,
    distance: Distance = SearchOptions.distance,
    class_dim: int = SearchOptions.class_dim,
    calibration_batches: PositiveInt = SearchOptions.calibration_batches,
    evaluation_batches: PositiveInt = SearchOptions.evaluation_batches,
    evaluations: NonNegativeInt = SearchOptions.evaluations,
    seed: NonNegativeInt = SearchOptions.seed,
    table: str | Path | None = SearchOptions.table,
    optimizers: Iterable[Optimizer] = (),
    dry_run: bool = False,
    progress_bar: bool = True,
) -> SearchResult:
    """Choose widths, ranks and depth of ``model`` under one or several budgets, and change it in place.

    Each choice is carried out alone on a copy, and its outputs are compared with those of the network as it is. The
    assignment with the least sum of distances within all budgets is found exactly; whole networks around it are then
    compared, because the distances of several changes do not add. Labels are not used.

    Args:
        model: trained; any module.
        example_inputs: what ``model`` is called with: a tensor, a tuple of positional arguments or a dict of keyword
            arguments.
        budget: what the model is to reach: ``MACs``, ``Params``, ``Size`` or ``Latency``, or several of them at once. A
            relative budget counts from the model before its first compression by this package.
        data: batches of the training data; of a tuple or list the first item is the model's input, a mapping is its
            keyword arguments.
        space: see `SearchOptions`. With a recipe the costs are those of int8 files, and the model is quantized finally.
        runtime: see `SearchOptions`.
        distance: see `SearchOptions`.
        class_dim: see `SearchOptions`.
        calibration_batches: see `SearchOptions`.
        evaluation_batches: see `SearchOptions`.
        evaluations: see `SearchOptions`.
        seed: see `SearchOptions`.
        table: see `SearchOptions`.
        optimizers: of the model; they follow.
        dry_run: only search.
        progress_bar: whether a terminal shows the progress.

    Returns:
        The assignment, the table, and the costs, predicted and measured.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, ``data`` has only one batch, or the file of ``table`` is of another
            space.
        BudgetError: no assignment meets the budgets; the model is unchanged.
        TargetError: the targets of a kind match nothing, or no kind has a choice.

    Example:
        >>> from lightning_light import MACs
        >>> layers = [nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)]
        >>> network, batches = nn.Sequential(*layers), list(torch.randn(4, 64, 16))
        >>> result = search(network, batches[0], MACs(0.5), data=batches)
        >>> result.measured["macs"] <= result.goals["macs"]
        True
    """
    options = SearchOptions(
        space, runtime, distance, class_dim, calibration_batches, evaluation_batches, evaluations, seed, table
    )
    budgets = check_budgets("search", budget, options)
    example = ExampleInput.of(example_inputs).to(model)
    parts = split_batches("search", model, data, calibration_batches, evaluation_batches)
    references = _references(model, example, budgets)
    result = find_assignment("search", model, example, budgets, options, parts, references, progress_bar=progress_bar)
    if not dry_run:
        apply_items(model, example, options.choices, result.items, calls=parts[0], optimizers=optimizers)
        state_of(model).references = {**references, **state_of(model).references}
        if result.quantized and options.recipe is not None:
            quantize(model, parts[0][0], options.recipe, data=parts[0], progress_bar=progress_bar)
    return result


def find_assignment(
    call: str,
    model: nn.Module,
    example: ExampleInput,
    budgets: Sequence[Budget],
    options: SearchOptions,
    parts: tuple[Sequence[ExampleInput], Sequence[ExampleInput]],
    references: Costs,
    *,
    progress_bar: bool,
) -> SearchResult:
    """Fill the table and solve; ``model`` is left as it is.

    Args:
        call: the function or callback, for messages.
        model: the network.
        example: one call of it.
        budgets: of different quantities.
        options: of the search.
        parts: calls for batch-norm statistics, and calls on which outputs are compared.
        references: quantity -> value that a relative budget counts from.
        progress_bar: whether a terminal shows the progress.
    """
    runtime, recipe = options.file_of(budgets)
    if runtime is not None:
        runtime.check()
    evaluator = Evaluator(model, example, options.choices, *parts, options.distance, options.class_dim)
    items = _items(call, model, example, options)
    meter = Meter(budgets, example, runtime, recipe)
    where = [platform.node()] if "seconds" in meter.of_file else []
    versions = [torch.__version__, "" if runtime is None else runtime.runtime(), *where]
    key = digest([evaluator.digest(), repr(options.choices), repr(recipe), *map(_measured, budgets), *versions])
    table = SearchTable.open(call, None if options.table is None else Path(options.table), key, items)
    if not meter.of_file and all(meter.count(model)[b.quantity] <= b.goal(references[b.quantity]) for b in budgets):
        table.costs, table.items = meter.count(model), []  # nothing is to be done
    fill_table(table, evaluator, meter, recipe, progress_bar=progress_bar)
    goals = {b.quantity: b.goal(references.get(b.quantity, table.costs[b.quantity])) for b in budgets}
    solver = Solver(call, table, evaluator, meter, goals, recipe, options.seed)
    solver.check_reachable()
    best = solver.solve(options.evaluations, progress_bar=progress_bar)
    predicted = {q: value for q, value in solver.predicted(best.items).items() if q in meter.of_file}
    found = table, goals, predicted, best.costs, best.score, tuple(solver.evaluated)
    return SearchResult(best.items, recipe is not None, *found)


def check_counts(
    call: str,
    model: nn.Module,
    example: ExampleInput,
    budgets: Sequence[Budget],
    options: SearchOptions,
    references: Costs,
) -> None:
    """Refuse budgets that no assignment meets, as far as they are counted; arguments as in `find_assignment`.

    Raises:
        BudgetError: names a value that can be reached.
        TargetError: no kind has a choice.
        ValueError: the file of the table is of another space.
    """
    items, of_file = _items(call, model, example, options), Meter(budgets, example, *options.file_of(budgets)).of_file
    SearchTable.open(call, None if options.table is None else Path(options.table), "", items)
    counted = [budget for budget in budgets if budget.quantity not in of_file]
    evaluator, meter = Evaluator(model, example, options.choices, (), ()), Meter(counted, example, None, None)
    table = SearchTable("", items, dict.fromkeys((item.name for item in items), 0.0), costs=meter.count(model))
    for item in items if counted else ():
        table.savings[item.name] = savings_of(table, meter.count(evaluator.changed([item])))
    goals = {budget.quantity: budget.goal(references[budget.quantity]) for budget in counted}
    Solver(call, table, evaluator, meter, goals, None, 0).check_reachable()


def _references(model: nn.Module, example: ExampleInput, budgets: Sequence[Budget]) -> Costs:
    """Return the counted quantities before the first compression by this package."""
    known = state_of(model).references if has_state(model) else {}
    counted = [budget for budget in budgets if not budget.runs_model]
    return {b.quantity: known.get(b.quantity) or b.measure(model, example) for b in counted}


def _items(call: str, model: nn.Module, example: ExampleInput, options: SearchOptions) -> list[Item]:
    items = [item for choices in options.choices for item in choices.items(model, example)]
    if not items:
        raise TargetError(
            f"`{call}(space={list(options.parts)})` on `{type(model).__name__}`: expected at least one choice, found "
            "no block, layer or channel that can be changed. Widen `targets`."
        )
    return items


def _measured(budget: Budget) -> str:
    """Describe what a budget measures, without its limit."""
    return f"{type(budget).__name__} {getattr(budget, 'runtime', None)!r} {getattr(budget, 'threads', None)}"
