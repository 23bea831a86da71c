"""What is known of the channels while a model runs: the face that the rules see."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lightning_light.dependency.labels import LabelUnion, varying

__all__ = ["TraceContext", "Split", "Tie"]

HEAD_COUNTS = ("num_heads", "n_heads", "nheads", "n_head", "nhead", "heads", "num_attention_heads")
HEAD_SIZES = ("head_dim", "dim_head", "d_head", "head_size", "attention_head_size", "d_k")
WIDTHS = ("embed_dim", "all_head_size", "inner_dim", "hidden_size", "d_model", "dim", "width")


@dataclass(frozen=True)
class Tie:
    """An integer attribute of a module that counts channels: ``labels`` are those it counts."""

    module: str
    attribute: str
    labels: Tensor


@dataclass(frozen=True)
class Split:
    """A dimension that the user's code cut into parts (attention heads, shuffled groups), as it stood before."""

    module: str
    parts: Tensor
    width: Tensor | None


@dataclass(eq=False)
class TraceContext:
    """Which tensors carry which labels, and what the code at hand does with them.

    Attributes:
        heads: what leaves an attention: ``"head"`` (whole heads) or ``"dim"`` (the same position of every head).
        book: which labels are one channel, and which must stay.
        ties: attributes that count channels.
        splits: dimensions that became heads or other parts.
        parts: labels, shape ``(parts, size)``, that the code took apart in equal parts, perhaps by ``chunk``.
        apart: labels that the code picked out of others by position.
        history: every operation, and the marks of its outputs.
        shape_before: of the first argument of the operation at hand, before it ran.
    """

    heads: str = "dim"
    book: LabelUnion = field(default_factory=LabelUnion)
    ties: list[Tie] = field(default_factory=list)
    splits: list[Split] = field(default_factory=list)
    parts: list[Tensor] = field(default_factory=list)
    apart: list[Tensor] = field(default_factory=list)
    history: list[tuple[str, list[list[Tensor]]]] = field(default_factory=list)
    shape_before: torch.Size = field(default_factory=torch.Size)
    _marks: MutableMapping[Tensor, list[Tensor]] = field(default_factory=WeakIdKeyDictionary)
    _counting: MutableMapping[Tensor, list[Tensor]] = field(default_factory=WeakIdKeyDictionary)
    _stack: list[tuple[str, nn.Module, Tensor | None]] = field(default_factory=list)
    _function: Any = None

    def marks(self, tensor: Tensor) -> list[Tensor]:
        """The marks of ``tensor``, tidied; those that vary nowhere are dropped."""
        tidy = [self.book.tidy(mark) for mark in self._marks.get(tensor, ())]
        return [mark for mark in tidy if varying(mark)]

    def give(self, tensor: Tensor, marks: Sequence[Tensor]) -> None:
        """``tensor`` carries ``marks`` from now on."""
        self._marks[tensor] = [mark for mark in marks if varying(mark)]

    def along(self, tensor: Tensor, dim: int, reason: str = "", *, only: bool = False) -> Tensor | None:
        """Labels along ``dim``, shape ``(size,)``; with ``reason``, what varies elsewhere is protected.

        With ``only`` nothing is returned, and what varies along ``dim`` is protected instead.
        """
        found = None
        for mark in self.marks(tensor):
            if mark.shape[dim] == 1 or only:
                if reason and (mark.shape[dim] > 1) == only:
                    self.book.protect(mark, reason)
                continue
            if len(varying(mark)) > 1:
                self.book.protect(mark, "varies along two dimensions at once")
            index = [slice(None) if d == dim % mark.dim() else 0 for d in range(mark.dim())]
            found = mark[tuple(index)] if found is None else found
        return found

    def couple(self, left: Tensor | None, right: Tensor | None, reason: str) -> None:
        """Merge two label vectors; where one side has none, the other must stay, for ``reason``."""
        if left is not None and right is not None:
            self.book.merge(left, right, reason)
        elif left is not None or right is not None:
            self.book.protect(left if left is not None else right, reason)  # type: ignore[arg-type]

    def give_indices(self, indices: Tensor, marks: Sequence[Tensor]) -> None:
        """The values of ``indices`` are numbers of channels: whoever uses them holds ``marks`` in place."""
        self._counting[indices] = list(marks)

    def again(self, tensor: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The operation at hand, on ``tensor`` in place of its first argument."""
        plain = [arg.cpu() if isinstance(arg, Tensor) else arg for arg in args]
        return self._function(tensor, *plain, **kwargs)

    def in_recurrent_layer(self) -> bool:
        """Whether the operation at hand runs inside an ``nn.RNNBase``."""
        return bool(self._stack) and isinstance(self._stack[-1][1], nn.RNNBase)

    def splits_heads(self, mark: Tensor) -> bool:
        """Whether the rows of ``mark`` are this module's attention heads, and whole heads are to leave."""
        module = self._stack[-1][1] if self._stack else None
        counts = [getattr(module, name, None) for name in HEAD_COUNTS]
        return self.heads == "head" and any(type(count) is int and _counts(count, mark) for count in counts)

    def tie(self, attribute: str, labels: Tensor | None) -> None:
        """The module at hand counts ``labels`` in ``attribute``, if it has it."""
        if labels is not None and self._stack and hasattr(self._stack[-1][1], attribute):
            number = getattr(self._stack[-1][1], attribute)
            once = type(number) is int and 1 < number < labels.numel()  # instance norm repeats them for every sample
            self.ties.append(Tie(self._stack[-1][0], attribute, labels[:number] if once else labels))

    def note_split(self, mark: Tensor, dims: Sequence[int]) -> None:
        """Remember how the user's code cut a dimension into parts."""
        if self._stack:
            name, _, width = self._stack[-1]
            self.splits.append(Split(name, mark.reshape([mark.shape[dim] for dim in dims]), width))

    def note_parts(self, mark: Tensor, dims: Sequence[int]) -> None:
        """Tie the attributes that count the heads, or a head's positions."""
        names, dim = (HEAD_COUNTS, dims[-2]) if mark.shape[dims[-2]] > 1 else (HEAD_SIZES, dims[-1])
        if mark.shape[dim] > 1:
            self._tie_by_name(names, mark)

    def note_merge(self, mark: Tensor) -> None:
        """Tie the attribute that names a width, where a reshape writes one."""
        if varying(mark):
            self._tie_by_name(WIDTHS, mark)

    def _tie_by_name(self, names: Sequence[str], mark: Tensor) -> None:
        module = self._stack[-1][1] if self._stack else None
        for name in names:
            if type(getattr(module, name, None)) is int and _counts(getattr(module, name), mark):
                self.tie(name, mark.reshape(-1)[: getattr(module, name)])


def _counts(number: int, mark: Tensor) -> bool:
    """Whether ``mark`` (one varying dimension) is ``number`` labels, perhaps repeated as a whole."""
    flat = mark.reshape(-1)
    if not 1 < number <= flat.numel() or flat.numel() % number:
        return False
    return bool((flat.view(-1, number) == flat[:number]).all())
