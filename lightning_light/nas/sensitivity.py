"""Fill the table of a search: carry out one item at a time on a copy, and measure."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_light.example_input import ExampleInput
from lightning_light.isolation import observe
from lightning_light.nas.choices import Item
from lightning_light.nas.costs import Meter
from lightning_light.nas.evaluation import Evaluator
from lightning_light.nas.table import SearchTable, savings_of
from lightning_light.nested import tensors_in
from lightning_light.progress_bar import with_progress_bar
from lightning_light.quantization import Recipe
from lightning_light.surgery.distributed import digest

__all__ = ["fill_table"]


def fill_table(
    table: SearchTable, evaluator: Evaluator, meter: Meter, recipe: Recipe | None, *, progress_bar: bool
) -> None:
    """Measure what the table does not have yet, and save it after every entry.

    The time is linear in the number of items. Costs that are measured on a file are measured once for all items of
    equal shapes, together: their sum is larger than the noise of a measurement.

    Args:
        table: completed in place.
        evaluator: compares outputs.
        meter: measures costs.
        recipe: of the int8 file; None for a float file.
        progress_bar: whether a terminal shows the progress.
    """
    now = meter.measure(partial(evaluator.changed, (), recipe))  # first: the later ones take turns with it
    if not table.costs:
        table.costs = {**meter.count(evaluator.model), **now}
        table.save()
    left = [item for item in table.items if item.name not in table.distances]
    for item in with_progress_bar(left, len(left), "outputs and counts", shown=progress_bar):
        network = evaluator.changed([item])
        table.shapes[item.name] = _shapes(network, evaluator.example)
        table.savings[item.name] = savings_of(table, meter.count(network))
        table.distances[item.name] = evaluator.score(network).distance
        del network  # before the next one is made
        table.save()
    groups = [group for group in _equal(table) if now.keys() - table.savings[group[0].name].keys()]
    for group in with_progress_bar(groups, len(groups), "files", shown=progress_bar):
        together = _compatible(group)
        measured = meter.measure(partial(evaluator.changed, together, recipe))
        for quantity, before in now.items():
            saved = table.costs[quantity] * (1.0 - measured[quantity] / before) / len(together)
            for item in group:
                table.savings[item.name][quantity] = saved
        table.save()


def _equal(table: SearchTable) -> list[list[Item]]:
    """Group the items that leave equal shapes."""
    groups: dict[tuple[str, str, str], list[Item]] = {}
    for item in table.items:
        groups.setdefault((item.kind, item.choice, table.shapes[item.name]), []).append(item)
    return list(groups.values())


def _compatible(items: Iterable[Item]) -> list[Item]:
    """Return those of ``items`` that can be carried out together."""
    found: list[Item] = []
    for item in items:
        if all(item.layers.isdisjoint(other.layers) for other in found):
            found.append(item)
    return found


def _shapes(network: nn.Module, example: ExampleInput) -> str:
    """Return the digest of the layers' types, parameters and inputs, in any order."""
    found: list[list[Any]] = []

    def record(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        inputs = [list(tensor.shape) for tensor in tensors_in((args, kwargs))]
        own: Iterable[Tensor] = module.parameters(recurse=False)
        found.append([type(module).__name__, [list(parameter.shape) for parameter in own], inputs])

    leaves = {name: module for name, module in network.named_modules() if next(module.children(), None) is None}
    observe(network, leaves, [example], record)
    return digest(sorted(found, key=repr))
