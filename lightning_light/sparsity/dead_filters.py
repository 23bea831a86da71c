"""Remove filters in which every weight is masked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lightning_light.dependency import ChannelGroup, DependencyGraph, trace_dependencies
from lightning_light.example_input import ExampleInput
from lightning_light.isolation import isolated
from lightning_light.sparsity.mask_state import cut_masks
from lightning_light.surgery.attachment import attach, has_state
from lightning_light.surgery.edit import cut, trial
from lightning_light.validation import NonNegativeFloat, validated

__all__ = ["remove_dead_channels"]


@validated
def remove_dead_channels(
    model: nn.Module,
    example_inputs: Any,
    *,
    exact: bool = True,
    tolerance: NonNegativeFloat = 1e-5,
    optimizers: Iterable[Optimizer] = (),
) -> dict[str, int]:
    """Remove channels without a nonzero weight that produces or reads them, in place; masks are cut with the weights.

    A dead filter may still add a constant, through a bias or the norm behind it; removing it then changes the outputs.
    With ``exact`` such channels are kept: each group is tried, and cut only if the outputs on the example are equal.

    Args:
        model: any module, or a LightningModule, whose checkpoints then record the cut.
        example_inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or an `ExampleInput`.
        exact: remove only channels whose removal changes no output; else every dead filter, to be trained on.
        tolerance: largest accepted change of the outputs, relative to the largest output.
        optimizers: their state is cut with the weights.

    Returns:
        Dependency group -> number of removed channels; empty if none.

    Raises:
        TraceError: the network does not run on the example input.
        UnsupportedError: a later method owns one of the layers.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> _ = model[0].weight.data[:5].zero_(), model[0].bias.data[:5].zero_()
        >>> remove_dead_channels(model, torch.randn(2, 8)), model[0].out_features
        ({'0': 5}, 11)
    """
    example = ExampleInput.of(example_inputs)
    graph = trace_dependencies(model, example.args, example.kwargs)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    kept = {g.name: keep for g in graph.groups if g.reason is None and not bool((keep := _alive(g, tensors)).all())}
    if exact:
        before = _outputs(model, example)
        kept = {
            name: keep for name, keep in kept.items() if _holds(model, graph, {name: keep}, before, example, tolerance)
        }
    if not kept:
        return {}
    positions = graph.kept_positions(kept)
    edit = cut(model, positions, attributes=graph.attributes(model, kept), optimizers=optimizers)
    if has_state(model):
        compression_state = attach(model)
        compression_state.record(edit.entry(), kept=positions)
        for state in compression_state.state.values():
            cut_masks(model, state, positions)
    return {name: int((~keep).sum()) for name, keep in kept.items()}


def _alive(group: ChannelGroup, tensors: Mapping[str, Tensor]) -> Tensor:
    """Mark the channels that a nonzero weight produces and one reads; at least one of each group."""
    produced, read = torch.zeros(group.width, dtype=torch.bool), torch.zeros(group.width, dtype=torch.bool)
    readers = False
    for member in group.members:
        if member.role not in ("out", "in"):
            continue
        rows = tensors[member.tensor].detach().movedim(member.dim, 0)[member.index.to(tensors[member.tensor].device)]
        used = (rows.reshape(group.width, -1) != 0).any(dim=1).cpu()
        if member.role == "out":
            produced |= used
        else:
            read, readers = read | used, True
    alive = produced & read if readers else produced
    if not bool(alive.any()):
        alive[0] = True
    return alive


def _outputs(model: nn.Module, example: ExampleInput) -> list[Tensor]:
    with isolated(model):
        return [leaf for leaf in tree_leaves(model(*example.args, **example.kwargs)) if isinstance(leaf, Tensor)]


def _holds(
    model: nn.Module,
    graph: DependencyGraph,
    kept: Mapping[str, Tensor],
    before: list[Tensor],
    example: ExampleInput,
    tolerance: float,
) -> bool:
    with trial(model, graph.kept_positions(kept), graph.attributes(model, kept), values=True):
        after = _outputs(model, example)
    return all(
        a.shape == b.shape and float((a - b).abs().max()) <= tolerance * max(float(b.abs().max()), 1e-12)
        for a, b in zip(after, before, strict=True)
    )
