"""Labels: one integer for every channel, and the book of which labels are one and the same channel."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["FIXED", "LabelUnion", "collapsed", "varying"]

FIXED = 0
"""The label of a position that no surgery may remove, for instance a zero that ``F.pad`` put there."""


def varying(marks: Tensor) -> tuple[int, ...]:
    """Dimensions along which ``marks`` is not broadcast."""
    return tuple(dim for dim, size in enumerate(marks.shape) if size > 1)


def collapsed(marks: Tensor) -> Tensor:
    """``marks``, with every dimension along which they are all the same after_pruning to one."""
    for dim in varying(marks):
        first = marks.narrow(dim, 0, 1)
        if torch.equal(first.expand_as(marks), marks):
            marks = first
    return marks


@dataclass
class LabelUnion:
    """A union-find over labels, kept as one tensor so that whole vectors are merged at once.

    Attributes:
        parent: label -> a label that it was merged with; a root points to itself.
        protected: ``(labels, reason)`` pairs of channels that must stay.
    """

    parent: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.long))
    protected: list[tuple[Tensor, str]] = field(default_factory=list)

    def copy(self) -> LabelUnion:
        """A book that may be written in without a change of this one."""
        return LabelUnion(self.parent.clone(), list(self.protected))

    def fresh(self, count: int) -> Tensor:
        """``count`` labels that nothing else has, shape ``(count,)``."""
        start = self.parent.numel()
        labels = torch.arange(start, start + count)
        self.parent = torch.cat([self.parent, labels])
        return labels

    def roots(self, labels: Tensor) -> Tensor:
        """The representative of every label; same shape."""
        roots = self.parent[labels]
        while True:
            above = self.parent[roots]
            if torch.equal(above, roots):
                break
            roots = above
        self.parent[labels] = roots
        return roots

    def tidy(self, marks: Tensor) -> Tensor:
        """Representatives, with every dimension along which they are all the same after_pruning to one."""
        return collapsed(self.roots(marks))

    def merge(self, left: Tensor, right: Tensor, reason: str = "") -> None:
        """Make broadcast ``left`` and ``right`` the same channels, position by position.

        A label that meets `FIXED` is protected, with ``reason``.
        """
        left, right = left + torch.zeros_like(right), right + torch.zeros_like(left)
        left, right = self.roots(left.reshape(-1)), self.roots(right.reshape(-1))
        lone = (left == FIXED) != (right == FIXED)
        if lone.any():
            self.protect(torch.maximum(left[lone], right[lone]), reason or "tied to positions of fixed size")
        both = (left != FIXED) & (right != FIXED) & (left != right)
        left, right = left[both], right[both]
        while left.numel():
            high, low = torch.maximum(left, right), torch.minimum(left, right)
            self.parent.scatter_reduce_(0, high, low, "amin")
            left, right = self.roots(left), self.roots(right)
            apart = left != right
            left, right = left[apart], right[apart]

    def protect(self, marks: Tensor, reason: str) -> None:
        """No channel in ``marks`` may leave; ``reason`` is what the user reads."""
        labels = torch.unique(marks)
        labels = labels[labels != FIXED]
        if labels.numel():
            self.protected.append((labels, reason))

    def reasons(self) -> dict[int, str]:
        """Root label -> why it is protected (the first reason given)."""
        found: dict[int, str] = {}
        for labels, reason in self.protected:
            for root in torch.unique(self.roots(labels)).tolist():
                found.setdefault(root, reason)
        return found
