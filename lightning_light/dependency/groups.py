"""Channel groups: which positions of which tensors are one channel, and which channels are alike."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_light.dependency.context import Tie
from lightning_light.dependency.labels import FIXED
from lightning_light.dependency.trace import Leaf, Tracer

__all__ = ["ChannelGroup", "DependencyGraph", "Member", "graph_of"]


@dataclass(frozen=True, eq=False)
class Member:
    """One dimension of one tensor that loses positions when a channel of the group leaves.

    Attributes:
        tensor: name of a parameter or buffer, as in ``named_parameters``.
        dim: the dimension along which it is cut.
        index: positions along ``dim``, shape ``(channels, positions a channel)``.
        role: ``"out"`` the layer that makes the channels, ``"in"`` a layer that reads them, ``"norm"`` a norm's scale,
            ``"bias"`` an added vector, ``"buffer"`` statistics.
    """

    tensor: str
    dim: int
    index: Tensor
    role: str


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that hang together in the same way: all have the same members.

    Attributes:
        name: the module that makes the channels.
        width: how many channels there are.
        members: where they live.
        reason: why they must stay; ``None`` where they may be pruned.
        roots: one label a channel, shape ``(width,)``.
    """

    name: str
    width: int
    members: tuple[Member, ...]
    reason: str | None
    roots: Tensor


@dataclass(frozen=True, eq=False)
class DependencyGraph:
    """Everything a cut has to know of a model.

    Attributes:
        groups: in the order in which the layers stand in the model.
        ties: attributes that count channels.
        shapes: of every parameter and buffer; tells whether the model is still the one that was traced.
    """

    groups: tuple[ChannelGroup, ...]
    ties: tuple[Tie, ...]
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)

    def kept_positions(self, kept: Mapping[str, Tensor]) -> dict[str, dict[int, Tensor]]:
        """Group name -> boolean mask of the channels that stay; returns tensor -> dim -> positions that stay.

        Groups that are not named stay whole.
        """
        masks: dict[tuple[str, int], Tensor] = {}
        for group in self.groups:
            mask = kept.get(group.name)
            if mask is None or bool(mask.all()):
                continue
            for member in group.members:
                size = self.shapes[member.tensor][member.dim]
                stays = masks.setdefault((member.tensor, member.dim), torch.ones(size, dtype=torch.bool))
                stays[member.index[~mask].reshape(-1)] = False
        positions: dict[str, dict[int, Tensor]] = {}
        for (tensor, dim), stays in masks.items():
            positions.setdefault(tensor, {})[dim] = stays.nonzero().reshape(-1)
        return positions

    def attributes(self, model: nn.Module, kept: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
        """New values of the attributes that count channels, by module name."""
        gone = self.gone(kept)
        changes: dict[str, dict[str, Any]] = {}
        for tie in self.ties if gone.numel() else ():
            left = int((~torch.isin(tie.labels, gone)).sum())
            if left != tie.labels.numel():
                old = getattr(model.get_submodule(tie.module), tie.attribute)
                new = (*old[:-1], left) if isinstance(old, tuple) else left
                changes.setdefault(tie.module, {})[tie.attribute] = new
        return changes

    def after_pruning(self, kept: Mapping[str, Tensor]) -> DependencyGraph:
        """The graph of the model after the cut ``kept``: nothing has to be traced again."""
        positions, gone = self.kept_positions(kept), self.gone(kept)
        shapes = {
            name: tuple(positions[name][d].numel() if d in positions.get(name, {}) else s for d, s in enumerate(shape))
            for name, shape in self.shapes.items()
        }
        tables = {
            (tensor, dim): _renumbering(self.shapes[tensor][dim], stays)
            for tensor, dims in positions.items()
            for dim, stays in dims.items()
        }
        groups = _in_order(self.shapes, [_after_pruning(group, kept.get(group.name), tables) for group in self.groups])
        ties = tuple(replace(tie, labels=tie.labels[~torch.isin(tie.labels, gone)]) for tie in self.ties)
        return DependencyGraph(groups, ties, shapes)

    def fits(self, model: nn.Module) -> bool:
        """Whether ``model`` still has the tensors and shapes that were traced."""
        return dict(self.shapes) == _shapes(model)

    def gone(self, kept: Mapping[str, Tensor]) -> Tensor:
        """Labels of the channels that leave."""
        lost = [group.roots[~kept[group.name]] for group in self.groups if group.name in kept]
        return torch.cat(lost) if lost else torch.empty(0, dtype=torch.long)


def _renumbering(size: int, stays: Tensor) -> Tensor:
    table = torch.full((size,), -1)
    table[stays] = torch.arange(stays.numel())
    return table


def _after_pruning(group: ChannelGroup, mask: Tensor | None, tables: Mapping[tuple[str, int], Tensor]) -> ChannelGroup:
    mask = torch.ones(group.width, dtype=torch.bool) if mask is None else mask
    members = []
    for member in group.members:
        index, table = member.index[mask], tables.get((member.tensor, member.dim))
        members.append(replace(member, index=index if table is None else table[index]))
    return replace(group, width=int(mask.sum()), members=tuple(members), roots=group.roots[mask])


def _in_order(tensors: Iterable[str], groups: Iterable[ChannelGroup]) -> tuple[ChannelGroup, ...]:
    """As the layers stand in the model; groups of one layer by their first position in it."""
    order = {name: number for number, name in enumerate(tensors)}
    firsts = ((order[g.members[0].tensor], g.members[0].dim, int(g.members[0].index[0, 0]), g) for g in groups)
    return tuple(group for *_, group in sorted(firsts, key=lambda first: first[:3]))


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def graph_of(model: nn.Module, tracer: Tracer) -> DependencyGraph:
    """Sort the labels of a finished trace into groups of like channels."""
    leaves = tracer.leaves
    roots = [tracer.book.roots(leaf.labels) for leaf in leaves]
    reasons = tracer.book.reasons()
    picks = [torch.unique(tracer.book.roots(labels)) for labels in tracer.apart]
    signature = _signatures([*roots, *picks], tracer.book.parent.numel(), reasons)
    by_signature: dict[int, list[tuple[Leaf, Tensor]]] = {}
    for leaf, root in zip(leaves, roots, strict=True):
        for value in torch.unique(signature[root]).tolist():
            by_signature.setdefault(value, []).append((leaf, root))
    groups = [_group(model, places, signature, value, reasons) for value, places in by_signature.items()]
    ties = tuple(replace(tie, labels=tracer.book.roots(tie.labels)) for tie in tracer.ties)
    shapes = _shapes(model)
    return DependencyGraph(_named(_in_order(shapes, groups)), ties, shapes)


def _signatures(roots: Sequence[Tensor], count: int, reasons: Mapping[int, str]) -> Tensor:
    """One number a label: equal where two channels are in the same ``roots``, equally often, and protected alike."""
    generator = torch.Generator().manual_seed(0)
    signature = torch.zeros(count, dtype=torch.long)
    for root in roots:
        weight = torch.randint(1, 2**60, (1,), generator=generator)
        signature.scatter_add_(0, root, weight.expand(root.numel()))
    kinds = sorted(set(reasons.values()))
    for label, reason in reasons.items():
        signature[label] += (kinds.index(reason) + 1) * 0x9E3779B97F4A7C1
    signature[FIXED] = 0
    return signature


def _group(
    model: nn.Module,
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
        members.append(Member(leaf.tensor, leaf.dim, index, _role(model, leaf)))
    sequence = torch.argsort(members[0].index[:, 0], stable=True)
    members = [replace(member, index=member.index[sequence]) for member in members]
    maker = next((m for m in members if m.role == "out"), members[0])
    name = maker.tensor.rpartition(".")[0] or maker.tensor
    return ChannelGroup(name, channels.numel(), tuple(members), reasons.get(int(channels[0])), channels[sequence])


def _role(model: nn.Module, leaf: Leaf) -> str:
    """What the tensor does with its channels; see `Member.role`."""
    path, _, name = leaf.tensor.rpartition(".")
    module = model.get_submodule(path)
    tensor = getattr(module, name, None)
    if tensor is None or not isinstance(tensor, nn.Parameter):
        return "buffer"
    if tensor.dim() > 1:
        swapped = isinstance(module, nn.Embedding) or getattr(module, "transposed", False)
        return "out" if leaf.dim == int(swapped) else "in"
    if name == "weight" and not isinstance(module, (nn.PReLU, nn.modules.conv._ConvNd, nn.Linear)):
        return "norm"
    return "bias"


def _named(groups: Sequence[ChannelGroup]) -> tuple[ChannelGroup, ...]:
    """A name of its own for each: where a layer makes several groups, by what else hangs on the channels.

    The name depends on the members alone, so that it is the same after a cut and after a resume.
    """
    makers = Counter((group.name, group.reason is None) for group in groups)
    named: dict[str, ChannelGroup] = {}
    for group in groups:
        places = sorted(f"{member.tensor}.{member.dim}.{member.index.shape[1]}" for member in group.members)
        mark = hashlib.sha256(" ".join([str(group.reason), *places]).encode()).hexdigest()[:4]
        alone = makers[group.name, group.reason is None] == 1 and (group.reason is None or not makers[group.name, True])
        name = group.name if alone else f"{group.name}#{mark}"
        twins = sum(other.partition("/")[0] == name for other in named)  # taken apart by position alone
        name = f"{name}/{twins + 1}" if twins else name
        named[name] = replace(group, name=name)
    return tuple(named.values())
