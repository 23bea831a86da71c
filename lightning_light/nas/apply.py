"""Carry out the items of a solution: blocks, operators, channels, then ranks; batch-norm statistics follow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_light.batch_norm import Statistics, measure_statistics, move_statistics
from lightning_light.example_input import ExampleInput
from lightning_light.nas.choices import Change, Choices, Item
from lightning_light.surgery.attachment import attach, record, recording

__all__ = ["apply_items", "in_order"]


def in_order(space: Iterable[Choices], items: Iterable[Item]) -> Iterator[tuple[Choices, list[Item]]]:
    """Yield the choices of each kind with their part of ``items``, in the order in which they are carried out."""
    items = list(items)
    for choices in sorted(space, key=lambda choices: choices.stage):
        if mine := [item for item in items if item.kind == choices.kind]:
            yield choices, mine


def apply_items(
    model: nn.Module,
    example: ExampleInput,
    space: Sequence[Choices],
    items: Iterable[Item],
    *,
    calls: Sequence[ExampleInput] = (),
    before: Mapping[str, Statistics] | None = None,
    optimizers: Iterable[Any] = (),
) -> None:
    """Carry out ``items`` on ``model``, in place, and record them in its edit log.

    Args:
        model: any module.
        example: one call of the model.
        space: the kinds of choices.
        items: of a solution.
        calls: of the model, on which batch-norm statistics are moved by what the changes did to them.
        before: statistics of ``model`` on ``calls``, where they are known.
        optimizers: of the model.

    Raises:
        UnsupportedError: a later method owns one of the layers.
    """
    optimizers = list(optimizers)
    with recording(model):
        statistics = measure_statistics(model, calls) if before is None else before
        for choices, mine in in_order(space, items):
            change = choices.carry_out(model, choices.plan(model, example, mine, calls), optimizers=optimizers)
            after = measure_statistics(model, calls)
            move_statistics(model, statistics, after, change.kept or {})
            statistics = after
            record(model, (), change.entry, change.kept)
            claim_layers(model, choices, change)


def claim_layers(model: nn.Module, choices: Choices, change: Change) -> None:
    """Claim the changed layers of ``model`` for the method that owns them from now on."""
    if change.method:
        state = attach(model)
        claimed = state.claims.get(change.method)
        layers = [*(claimed.layers if claimed else ()), *change.layers]
        state.claim(model, change.method, choices.stage, layers, follows_cuts=change.follows_cuts)
