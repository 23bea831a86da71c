"""Labels: one integer per channel, and a union-find over the labels that stand for the same channel."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["FIXED", "LabelUnion", "collapsed", "varying"]

FIXED = 0
"""The label of a position that cannot be removed, for instance a zero that ``F.pad`` adds."""


def varying(labels: Tensor) -> tuple[int, ...]:
    """Return the dimensions along which ``labels`` is not broadcast."""
    return tuple(dim for dim, size in enumerate(labels.shape) if size > 1)


def collapsed(labels: Tensor) -> Tensor:
    """Reduce every dimension along which all labels are equal to size one."""
    for dim in varying(labels):
        first = labels.narrow(dim, 0, 1)
        if labels.stride(dim) == 0 or torch.equal(first.expand_as(labels), labels):  # 0: an expanded dimension
            labels = first
    return labels


@dataclass
class LabelUnion:
    """Union-find over labels, stored as one tensor so that whole vectors are merged at once.

    Attributes:
        parent: label -> a label that it was merged with; a root is its own parent.
        protected: ``(labels, reason)`` pairs of channels that are kept.
    """

    parent: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.long))
    protected: list[tuple[Tensor, str]] = field(default_factory=list)

    def copy(self) -> LabelUnion:
        """Return a copy that can be changed independently."""
        return LabelUnion(self.parent.clone(), list(self.protected))

    def new(self, count: int) -> Tensor:
        """Return ``count`` new labels, shape ``(count,)``."""
        start = self.parent.numel()
        labels = torch.arange(start, start + count)
        self.parent = torch.cat([self.parent, labels])
        return labels

    def roots(self, labels: Tensor) -> Tensor:
        """Return the representative of every label, in the same shape."""
        roots = self.parent[labels]
        above = self.parent[roots]
        if torch.equal(above, roots):
            return roots
        while not torch.equal(above, roots):
            roots, above = above, self.parent[above]
        self.parent[labels] = roots  # shorten the path for the next call
        return roots

    def canonical(self, labels: Tensor) -> Tensor:
        """Return the representatives, with every dimension along which they are all equal reduced to size one."""
        return collapsed(self.roots(labels))

    def merge(self, left: Tensor, right: Tensor, reason: str = "") -> None:
        """Couple ``left`` and ``right``, broadcast to one shape, position by position.

        A label that is coupled to `FIXED` is protected for ``reason``.
        """
        if left.shape == right.shape and torch.equal(left, right):
            return
        left, right = torch.broadcast_tensors(left, right)  # type: ignore[no-untyped-call]  # torch's own signature
        left, right = self.roots(left.reshape(-1)), self.roots(right.reshape(-1))
        single = (left == FIXED) != (right == FIXED)
        if single.any():
            self.protect(torch.maximum(left[single], right[single]), reason or "coupled to positions of fixed size")
        both = (left != FIXED) & (right != FIXED) & (left != right)
        left, right = left[both], right[both]
        while left.numel():
            high, low = torch.maximum(left, right), torch.minimum(left, right)
            self.parent.scatter_reduce_(0, high, low, "amin")
            left, right = self.roots(left), self.roots(right)
            unequal = left != right
            left, right = left[unequal], right[unequal]

    def protect(self, labels: Tensor, reason: str) -> None:
        """Keep the channels in ``labels``, for a ``reason`` that is shown to the user."""
        labels = torch.unique(labels)
        labels = labels[labels != FIXED]
        if labels.numel():
            self.protected.append((labels, reason))

    def reasons(self) -> dict[int, str]:
        """Map root label -> why it is protected: the first reason given."""
        found: dict[int, str] = {}
        for labels, reason in self.protected:
            for root in torch.unique(self.roots(labels)).tolist():
                found.setdefault(root, reason)
        return found
