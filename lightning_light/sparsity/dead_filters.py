"""Whole filters that masks have left without a weight: take them out for good."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lightning_light.dependency import ChannelGroup, DependencyGraph, trace_dependencies
from lightning_light.measure.isolation import isolated
from lightning_light.surgery.attachment import attach, has_state
from lightning_light.surgery.edit import cut, take, trial

__all__ = ["remove_dead_channels"]


def remove_dead_channels(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    exact: bool = True,
    tolerance: float = 1e-5,
    optimizers: Iterable[Optimizer] = (),
) -> dict[str, int]:
    """Remove channels that no weight makes, or that no weight reads, in place. The rest of the masks goes along.

    A filter of zeros may still add a constant, through a bias or the norm behind it; removing it then changes the
    answers. With ``exact`` such channels stay: each group is tried, and cut only if the outputs on the example hold.

    Args:
        model: any module, or a LightningModule, whose checkpoints then know of the cut.
        args: positional arguments of one call.
        kwargs: keyword arguments of that call.
        exact: remove only what changes no output; else every filter of zeros, to be trained on.
        tolerance: how far outputs may move, relative to the largest.
        optimizers: whose state is to follow.

    Returns:
        Group of coupled layers -> how many of its channels were removed; empty if none.

    Raises:
        TraceError: the network does not run on the example input.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> _ = model[0].weight.data[:5].zero_(), model[0].bias.data[:5].zero_()
        >>> remove_dead_channels(model, (torch.randn(2, 8),)), model[0].out_features
        ({'0': 5}, 11)
    """
    graph = trace_dependencies(model, args, kwargs)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    kept = {g.name: keep for g in graph.groups if g.reason is None and not bool((keep := _alive(g, tensors)).all())}
    if exact:
        before = _outputs(model, args, kwargs)
        kept = {
            name: keep
            for name, keep in kept.items()
            if _holds(model, graph, {name: keep}, before, args, kwargs, tolerance)
        }
    if not kept:
        return {}
    positions = graph.kept_positions(kept)
    edit = cut(model, positions, attributes=graph.attributes(model, kept), optimizers=optimizers)
    if has_state(model):
        compression_state = attach(model)
        compression_state.record(edit.entry(), kept=positions)
        for state in compression_state.state.values():
            masks = state.get("masks", {})
            state |= {"masks": {n: take(m, positions.get(n, {})) for n, m in masks.items()}} if masks else {}
    return {name: int((~keep).sum()) for name, keep in kept.items()}


def _alive(group: ChannelGroup, tensors: Mapping[str, Tensor]) -> Tensor:
    """Which channels some weight makes and some weight reads; at least one of each group stays."""
    made, read = torch.zeros(group.width, dtype=torch.bool), torch.zeros(group.width, dtype=torch.bool)
    readers = False
    for member in group.members:
        if member.role not in ("out", "in"):
            continue
        rows = tensors[member.tensor].detach().movedim(member.dim, 0)[member.index.to(tensors[member.tensor].device)]
        used = (rows.reshape(group.width, -1) != 0).any(dim=1).cpu()
        if member.role == "out":
            made |= used
        else:
            read, readers = read | used, True
    alive = made & read if readers else made
    if not bool(alive.any()):
        alive[0] = True
    return alive


def _outputs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> list[Tensor]:
    with isolated(model):
        return [leaf for leaf in tree_leaves(model(*args, **(kwargs or {}))) if isinstance(leaf, Tensor)]


def _holds(
    model: nn.Module,
    graph: DependencyGraph,
    kept: Mapping[str, Tensor],
    before: list[Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    tolerance: float,
) -> bool:
    with trial(model, graph.kept_positions(kept), graph.attributes(model, kept), values=True):
        after = _outputs(model, args, kwargs)
    return all(
        a.shape == b.shape and float((a - b).abs().max()) <= tolerance * max(float(b.abs().max()), 1e-12)
        for a, b in zip(after, before, strict=True)
    )
