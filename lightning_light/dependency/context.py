"""The state of a trace that rules read and change: the labels of tensors, and the module that is running."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lightning_light.dependency.labels import LabelUnion, varying
from lightning_light.dependency.placeholders import Placeholders
from lightning_light.module_stack import ModuleStack

__all__ = ["Leaf", "SizeAttribute", "Split", "TraceContext", "counts", "integers_of"]

HEAD_COUNTS = ("num_heads", "n_heads", "nheads", "n_head", "nhead", "heads", "num_attention_heads")
HEAD_SIZES = ("head_dim", "dim_head", "d_head", "head_size", "attention_head_size", "d_k", "key_value_proj_dim")
PART_SIZES = (*HEAD_SIZES, "key_dim", "value_dim", "val_dim", "d_v")
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
WIDTHS = ("embed_dim", "all_head_size", "inner_dim", "hidden_size", "d_model", "dim", "width", "val_attn_dim")


@dataclass(frozen=True)
class Leaf:
    """One dimension of one parameter or buffer, and the label of each of its positions."""

    tensor: str
    dim: int
    labels: Tensor


@dataclass(frozen=True, eq=False)
class SizeAttribute:
    """An integer attribute of a module that states a number of channels.

    Attributes:
        module: name of the module.
        attribute: name of its attribute, such as ``num_features``.
        labels: of the channels that it counts.
    """

    module: str
    attribute: str
    labels: Tensor


@dataclass(frozen=True)
class Split:
    """A dimension that a reshape in the user's code split into parts, such as attention heads or groups.

    Attributes:
        module: name of the module that ran.
        parts: labels, one row per part.
        width: labels along the last dimension of the module's input.
    """

    module: str
    parts: Tensor
    width: Tensor | None


@dataclass(eq=False)
class TraceContext:
    """The labels of every tensor, and what the traced code does with them.

    A tensor has a list of label tensors of its own rank. Each has size one in every dimension along which it does not
    vary, so an activation ``(N, C, H, W)`` has one of shape ``(1, C, 1, 1)`` and a weight ``(O, I, k, k)`` has two.

    Attributes:
        heads: what is removed from an attention: ``"head"`` (whole heads) or ``"dim"`` (the same position of every
            head).
        union: which labels stand for one channel, and which are protected.
        size_attributes: module attributes that count channels.
        splits: dimensions that a reshape split into heads or other parts.
        parts: labels, shape ``(parts, size)``, that the code split into equal parts, perhaps by ``chunk``.
        selected: labels that the code selected by position.
        history: every operation, and the labels of its outputs.
        roles: (parameter, dimension) -> ``"in"`` or ``"out"``, where a matrix product reads it.
        shape_before: shape of the operation's first argument before it ran.
        modules: the modules that are running.
        leaves: the dimensions that were labelled.
        output_shapes: of the model.
        placeholders: the tensors whose values are not computed.
    """

    heads: str = "dim"
    union: LabelUnion = field(default_factory=LabelUnion)
    size_attributes: list[SizeAttribute] = field(default_factory=list)
    splits: list[Split] = field(default_factory=list)
    parts: list[Tensor] = field(default_factory=list)
    selected: list[Tensor] = field(default_factory=list)
    history: list[tuple[str, list[list[Tensor]]]] = field(default_factory=list)
    roles: dict[tuple[str, int], str] = field(default_factory=dict)
    shape_before: torch.Size = field(default_factory=torch.Size)
    _labels: MutableMapping[Tensor, list[Tensor]] = field(default_factory=WeakIdKeyDictionary)
    _indices: MutableMapping[Tensor, list[Tensor]] = field(default_factory=WeakIdKeyDictionary)
    _parameters: MutableMapping[Tensor, tuple[str, list[int]]] = field(default_factory=WeakIdKeyDictionary)
    modules: ModuleStack = field(default_factory=ModuleStack)
    leaves: list[Leaf] = field(default_factory=list)
    output_shapes: list[tuple[int, ...]] = field(default_factory=list)
    placeholders: Placeholders = field(default_factory=Placeholders)
    _widths: list[Tensor | None] = field(default_factory=list)
    _function: Any = None

    def labels_of(self, tensor: Tensor) -> list[Tensor]:
        """Return the canonical labels of ``tensor``, without those that vary along no dimension."""
        canonical = [self.union.canonical(label) for label in self._labels.get(tensor, ())]
        return [label for label in canonical if varying(label)]

    def stored_labels(self, tensor: Tensor) -> Sequence[Tensor]:
        """Return the labels of ``tensor`` as they were set, which later merges may have coupled."""
        return self._labels.get(tensor, ())

    def share_labels(self, source: Tensor, alias: Tensor) -> None:
        """Give ``alias``, which shares the memory of ``source``, its labels."""
        self._labels[alias] = self._labels.get(source, [])

    def name_parameter(self, tensor: Tensor, name: str) -> None:
        """Note that ``tensor`` is the parameter or buffer ``name``."""
        self._parameters[tensor] = (name, list(range(tensor.dim())))

    def follow_parameter(self, source: Tensor, view: Tensor, dims: Sequence[int] | None) -> None:
        """Note that dimension ``d`` of ``view`` is ``dims[d]`` of ``source``, if that is a parameter or its view."""
        if dims is not None and source in self._parameters:
            name, own = self._parameters[source]
            self._parameters[view] = (name, [own[dim] for dim in dims])

    def note_roles(self, tensor: Tensor, *, read: int, produced: int) -> None:
        """Note which dimensions of a parameter read channels in a matrix product, and which produce them."""
        if tensor in self._parameters:
            name, dims = self._parameters[tensor]
            self.roles.setdefault((name, dims[read]), "in")
            self.roles.setdefault((name, dims[produced]), "out")

    def couple_labels(self, target: Tensor, source: Tensor) -> None:
        """Couple the channels of ``target`` with those of ``source``, which is written into it."""
        for own in self.labels_of(target):
            for other in self.labels_of(source):
                if varying(own) == varying(other):
                    self.union.merge(own, other)

    def set_labels(self, tensor: Tensor, labels: Sequence[Tensor]) -> None:
        """Set the labels of ``tensor``."""
        self._labels[tensor] = [label for label in labels if varying(label)]

    def along(self, tensor: Tensor, dim: int, reason: str = "", *, only: bool = False) -> Tensor | None:
        """Return the labels along ``dim``, shape ``(size,)``; None if there are none.

        Args:
            tensor: any tensor.
            dim: the dimension.
            reason: protect the labels that vary along other dimensions, for this reason.
            only: return None, and protect the labels that vary along ``dim`` instead.
        """
        found = None
        for label in self.labels_of(tensor):
            if label.shape[dim] == 1 or only:
                if reason and (label.shape[dim] > 1) == only:
                    self.union.protect(label, reason)
                continue
            if len(varying(label)) > 1:
                self.union.protect(label, "varies along two dimensions of one tensor")
            index = [slice(None) if d == dim % label.dim() else 0 for d in range(label.dim())]
            found = label[tuple(index)] if found is None else found
        return found

    def couple(self, left: Tensor | None, right: Tensor | None, reason: str) -> None:
        """Merge two label vectors; where one side has none, protect the other for ``reason``."""
        if left is not None and right is not None:
            self.union.merge(left, right, reason)
        elif left is not None or right is not None:
            self.union.protect(left if left is not None else right, reason)  # type: ignore[arg-type]

    def set_indices(self, indices: Tensor, labels: Sequence[Tensor]) -> None:
        """Note that the values of ``indices`` are channel indices: an operation that reads them protects ``labels``."""
        self._indices[indices] = list(labels)

    def rerun(self, tensor: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run the current operation on ``tensor`` in place of its first argument."""
        plain = [arg.cpu() if isinstance(arg, Tensor) else arg for arg in args]
        return self._function(tensor, *plain, **kwargs)

    def states_size(self, size: int) -> bool:
        """Check whether ``size`` is a number of the running module, which may count channels."""
        return size > 1 and self._module is not None and size in integers_of(self._module).values()

    def splits_heads(self, label: Tensor) -> bool:
        """Check whether whole heads are removed, and the rows of ``label`` are the attention heads of the module."""
        return self.heads == "head" and any(counts(number, label) for number in self._head_counts())

    def counts_heads(self, sizes: Sequence[int]) -> bool:
        """Check whether one of ``sizes`` is the number of attention heads of the running module."""
        return not self._head_counts().isdisjoint(sizes)

    def _head_counts(self) -> set[int]:
        numbers = [getattr(self._module, name, None) for name in HEAD_COUNTS]
        return {number for number in numbers if type(number) is int}

    def note_attribute(self, attribute: str, labels: Tensor | None) -> None:
        """Note that the running module counts ``labels`` in ``attribute``, if it has that."""
        call = self.modules.current
        if labels is not None and call is not None and hasattr(call.module, attribute):
            number = getattr(call.module, attribute)
            once = type(number) is int and 1 < number < labels.numel()  # instance norm repeats them for each sample
            self.size_attributes.append(SizeAttribute(call.name, attribute, labels[:number] if once else labels))

    def note_split(self, label: Tensor, dims: Sequence[int]) -> None:
        """Note how the user's code splits a dimension into parts."""
        if (call := self.modules.current) is not None:
            self.splits.append(Split(call.name, label.reshape([label.shape[dim] for dim in dims]), self._widths[-1]))

    def note_parts(self, label: Tensor, dims: Sequence[int]) -> None:
        """Note the attributes that count the heads, or the positions of a head."""
        names, dim = (HEAD_COUNTS, dims[-2]) if label.shape[dims[-2]] > 1 else (PART_SIZES, dims[-1])
        if label.shape[dim] > 1:
            self._note_attribute_named(names, label)

    def note_selection(self, label: Tensor) -> None:
        """Note the attribute that counts channels which the code selects by position, as ``split`` does."""
        self._note_attribute_named(PART_SIZES, label)

    def note_merge(self, label: Tensor) -> None:
        """Note the attribute that states a width, where a reshape merges dimensions."""
        if varying(label):
            self._note_attribute_named(WIDTHS, label)

    def _note_attribute_named(self, names: Sequence[str], label: Tensor) -> None:
        for name in names:
            number = getattr(self._module, name, None)
            if type(number) is int and counts(number, label):
                self.note_attribute(name, label.reshape(-1)[:number])

    def couple_attention(self, arguments: Mapping[str, Any]) -> None:
        """Couple the inner and outer width of an attention that torch computes, which it expects to be equal.

        Args:
            arguments: of ``torch.nn.functional.multi_head_attention_forward``, by name.
        """
        stream, out = self.along(arguments["query"], -1), arguments["out_proj_weight"]
        rows = [self.along(arguments[name], 0) for name in _PROJECTIONS if arguments.get(name) is not None]
        rows.append(self.along(out, 1))
        if isinstance(self._module, nn.MultiheadAttention):
            rows.append(self.along(out, 0))  # as wide as the attribute, also where nothing is added to it
        for labels in rows:
            if labels is not None and stream is not None:
                self.union.merge(labels.reshape(-1, stream.numel()), stream)
            elif labels is not None:
                self.union.protect(labels, "is as wide as the query of its attention, which is of fixed size")
        if stream is not None:
            self.note_merge(stream)

    @property
    def _module(self) -> nn.Module | None:
        """Return the innermost module that is running."""
        call = self.modules.current
        return None if call is None else call.module


def integers_of(module: nn.Module) -> dict[str, int]:
    """Return the integer attributes of a module that may count channels."""
    return {name: value for name, value in vars(module).items() if type(value) is int and value > 1}


def counts(number: int, label: Tensor) -> bool:
    """Check whether ``label``, which varies along one dimension, is ``number`` labels, perhaps repeated as a whole."""
    flat = label.reshape(-1)
    if not 1 < number <= flat.numel() or flat.numel() % number:
        return False
    return bool((flat.view(-1, number) == flat[:number]).all())
