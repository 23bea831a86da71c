"""Dependency groups: which positions of which tensors are one channel, and which channels have the same members."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_light.dependency.context import Leaf, SizeAttribute
from lightning_light.dependency.labels import FIXED
from lightning_light.dependency.trace import Tracer

__all__ = ["ChannelGroup", "DependencyGraph", "Member", "graph_of"]


@dataclass(frozen=True, eq=False)
class Member:
    """One dimension of one tensor that loses positions when a channel of the group is removed.

    Attributes:
        tensor: name of a parameter or buffer, as in ``named_parameters``.
        dim: the dimension that is cut.
        index: positions along ``dim``, shape ``(channels, positions per channel)``.
        role: ``"out"`` for the layer that produces the channels, ``"in"`` for a layer that reads them, ``"norm"`` for
            the scale of a norm, ``"bias"`` for an added vector, ``"buffer"`` for statistics.
    """

    tensor: str
    dim: int
    index: Tensor
    role: str


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that are coupled in the same way: each has positions in the same members.

    Attributes:
        name: of the module that produces the channels.
        width: number of channels.
        members: the tensors that hold them.
        reason: why the channels are kept; None where they may be pruned.
        roots: one label per channel, shape ``(width,)``.
    """

    name: str
    width: int
    members: tuple[Member, ...]
    reason: str | None
    roots: Tensor


@dataclass(frozen=True, eq=False)
class DependencyGraph:
    """The coupled channels of a model: what has to change together when channels are removed.

    Attributes:
        groups: in the order of the layers in the model.
        size_attributes: module attributes that count channels.
        shapes: of every parameter and buffer when the model was traced.
    """

    groups: tuple[ChannelGroup, ...]
    size_attributes: tuple[SizeAttribute, ...]
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)

    def kept_positions(self, kept: Mapping[str, Tensor]) -> dict[str, dict[int, Tensor]]:
        """Map tensor name -> dimension -> positions that are kept.

        Args:
            kept: group name -> boolean mask of the channels that are kept; other groups are kept whole.
        """
        masks: dict[tuple[str, int], Tensor] = {}
        for group in self.groups:
            mask = kept.get(group.name)
            if mask is None or bool(mask.all()):
                continue
            for member in group.members:
                size = self.shapes[member.tensor][member.dim]
                remaining = masks.setdefault((member.tensor, member.dim), torch.ones(size, dtype=torch.bool))
                remaining[member.index[~mask].reshape(-1)] = False
        positions: dict[str, dict[int, Tensor]] = {}
        for (tensor, dim), remaining in masks.items():
            positions.setdefault(tensor, {})[dim] = remaining.nonzero().reshape(-1)
        return positions

    def attributes(self, model: nn.Module, kept: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
        """Map module name -> attribute -> new value, for the attributes that count channels."""
        removed = self.removed(kept)
        changes: dict[str, dict[str, Any]] = {}
        for attribute in self.size_attributes if removed.numel() else ():
            left = int((~torch.isin(attribute.labels, removed)).sum())
            if left != attribute.labels.numel():
                old = getattr(model.get_submodule(attribute.module), attribute.attribute)
                new = (*old[:-1], left) if isinstance(old, tuple) else left
                changes.setdefault(attribute.module, {})[attribute.attribute] = new
        return changes

    def after_pruning(self, kept: Mapping[str, Tensor]) -> DependencyGraph:
        """Return the graph of the model after the cut ``kept``, without tracing again."""
        positions, removed = self.kept_positions(kept), self.removed(kept)
        shapes = {
            name: tuple(positions[name][d].numel() if d in positions.get(name, {}) else s for d, s in enumerate(shape))
            for name, shape in self.shapes.items()
        }
        tables = {
            (tensor, dim): _renumbering(self.shapes[tensor][dim], remaining)
            for tensor, dims in positions.items()
            for dim, remaining in dims.items()
        }
        groups = _in_order(self.shapes, [_after_pruning(group, kept.get(group.name), tables) for group in self.groups])
        size_attributes = tuple(
            replace(attribute, labels=attribute.labels[~torch.isin(attribute.labels, removed)])
            for attribute in self.size_attributes
        )
        return DependencyGraph(groups, size_attributes, shapes)

    def fits(self, model: nn.Module) -> bool:
        """Check whether ``model`` still has the tensors and shapes that were traced."""
        return dict(self.shapes) == _shapes(model)

    def removed(self, kept: Mapping[str, Tensor]) -> Tensor:
        """Return the labels of the channels that ``kept`` removes."""
        lost = [group.roots[~kept[group.name]] for group in self.groups if group.name in kept]
        return torch.cat(lost) if lost else torch.empty(0, dtype=torch.long)


def _renumbering(size: int, remaining: Tensor) -> Tensor:
    table = torch.full((size,), -1)
    table[remaining] = torch.arange(remaining.numel())
    return table


def _after_pruning(group: ChannelGroup, mask: Tensor | None, tables: Mapping[tuple[str, int], Tensor]) -> ChannelGroup:
    mask = torch.ones(group.width, dtype=torch.bool) if mask is None else mask
    members = []
    for member in group.members:
        index, table = member.index[mask], tables.get((member.tensor, member.dim))
        members.append(replace(member, index=index if table is None else table[index]))
    return replace(group, width=int(mask.sum()), members=tuple(members), roots=group.roots[mask])


def _in_order(tensors: Iterable[str], groups: Iterable[ChannelGroup]) -> tuple[ChannelGroup, ...]:
    """Sort by the order of the layers in the model; groups of one layer by their first position in it."""
    order = {name: number for number, name in enumerate(tensors)}
    firsts = ((order[g.members[0].tensor], g.members[0].dim, int(g.members[0].index[0, 0]), g) for g in groups)
    return tuple(group for *_, group in sorted(firsts, key=lambda first: first[:3]))


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def graph_of(model: nn.Module, tracer: Tracer) -> DependencyGraph:
    """Sort the labels of a finished trace into groups of channels that are coupled in the same way."""
    leaves = tracer.leaves
    roots = [tracer.union.roots(leaf.labels) for leaf in leaves]
    reasons = tracer.union.reasons()
    selections = [torch.unique(tracer.union.roots(labels)) for labels in tracer.selected]
    signature = _signatures([*roots, *selections], tracer.union.parent.numel(), reasons)
    by_signature: dict[int, list[tuple[Leaf, Tensor]]] = {}
    for leaf, root in zip(leaves, roots, strict=True):
        for value in torch.unique(signature[root]).tolist():
            by_signature.setdefault(value, []).append((leaf, root))
    groups = [_group(model, tracer, places, signature, value, reasons) for value, places in by_signature.items()]
    size_attributes = tuple(
        replace(attribute, labels=tracer.union.roots(attribute.labels)) for attribute in tracer.size_attributes
    )
    shapes = _shapes(model)
    return DependencyGraph(_named(_in_order(shapes, groups)), size_attributes, shapes)


def _signatures(roots: Sequence[Tensor], count: int, reasons: Mapping[int, str]) -> Tensor:
    """Return a number per label: equal where two are in the same ``roots``, equally often, and equally protected."""
    generator = torch.Generator().manual_seed(0)
    signature = torch.zeros(count, dtype=torch.long)
    for root in roots:
        weight = torch.randint(1, 2**60, (1,), generator=generator)
        signature.scatter_add_(0, root, weight.expand(root.numel()))
    kinds = sorted(set(reasons.values()))
    for label, reason in reasons.items():
        signature[label] += (kinds.index(reason) + 1) * 0x9E3779B97F4A7C1 % 2**63
    signature[FIXED] = 0
    return signature


def _group(
    model: nn.Module,
    tracer: Tracer,
    places: Sequence[tuple[Leaf, Tensor]],
    signature: Tensor,
    value: int,
    reasons: Mapping[int, str],
) -> ChannelGroup:
    first = places[0][1]
    mine = first[signature[first] == value]
    channels = torch.unique(mine)
    members = []
    for leaf, root in places:
        positions = (signature[root] == value).nonzero().reshape(-1)
        order = torch.argsort(torch.searchsorted(channels, root[positions]), stable=True)
        index = positions[order].reshape(channels.numel(), -1)
        members.append(Member(leaf.tensor, leaf.dim, index, _role(model, leaf, tracer.roles)))
    sequence = torch.argsort(members[0].index[:, 0], stable=True)
    members = [replace(member, index=member.index[sequence]) for member in members]
    producer = next((m for m in members if m.role == "out"), members[0])
    name = producer.tensor.rpartition(".")[0] or producer.tensor
    return ChannelGroup(name, channels.numel(), tuple(members), reasons.get(int(channels[0])), channels[sequence])


def _role(model: nn.Module, leaf: Leaf, roles: Mapping[tuple[str, int], str]) -> str:
    """Return what the tensor does with its channels; see `Member`."""
    path, _, name = leaf.tensor.rpartition(".")
    module = model.get_submodule(path)
    tensor = getattr(module, name, None)
    if tensor is None or not isinstance(tensor, nn.Parameter):
        return "buffer"
    if tensor.dim() > 1:
        if isinstance(module, nn.Embedding) or getattr(module, "transposed", False):
            return "out" if leaf.dim == 1 else "in"
        return roles.get((leaf.tensor, leaf.dim), "out" if leaf.dim == 0 else "in")
    if name == "weight" and not isinstance(module, (nn.PReLU, nn.modules.conv._ConvNd, nn.Linear)):
        return "norm"
    return "bias"


def _named(groups: Sequence[ChannelGroup]) -> tuple[ChannelGroup, ...]:
    """Give each group a unique name: where a layer produces several groups, with a digest of their members.

    The name depends on the members alone, so that it is the same after a cut and after a resume.
    """
    producers = Counter((group.name, group.reason is None) for group in groups)
    named: dict[str, ChannelGroup] = {}
    for group in groups:
        places = sorted(f"{member.tensor}.{member.dim}.{member.index.shape[1]}" for member in group.members)
        digest = hashlib.sha256(" ".join([str(group.reason), *places]).encode()).hexdigest()[:4]
        alone = producers[group.name, group.reason is None] == 1 and (
            group.reason is None or not producers[group.name, True]
        )
        name = group.name if alone else f"{group.name}#{digest}"
        others = sum(other.partition("/")[0] == name for other in named)  # that differ in position alone
        name = f"{name}/{others + 1}" if others else name
        named[name] = replace(group, name=name)
    return tuple(named.values())
