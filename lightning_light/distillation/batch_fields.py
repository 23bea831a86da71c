"""Which parts of a batch are labels, mask and teacher inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_light.distillation.student_hook import ForwardCall
from lightning_light.example_input import ExampleInput
from lightning_light.selectors import Selector, labels_of, select
from lightning_light.validation import validated

__all__ = ["BatchFields", "Positions"]


@dataclass(frozen=True, eq=False)
class Positions:
    """What the losses read of a batch.

    Attributes:
        labels: of each position; None if no loss needs them.
        mask: which positions count; None for all.
    """

    labels: Tensor | None
    mask: Tensor | None


@validated
@dataclass(frozen=True)
class BatchFields:
    """Which parts of a batch are labels, mask and teacher inputs.

    Args:
        labels: the labels: a key, a position or a function; by default the second part, or the key ``labels``,
            ``target`` or ``y``.
        mask: which positions count, for instance ``"attention_mask"``; by default all.
        ignore_index: positions with this label do not count.
        inputs: batch -> inputs of the teacher (a tuple is arguments, a dict is keyword arguments); by default the
            inputs of the student's forward.

    Example:
        >>> BatchFields(mask="attention_mask", ignore_index=-100)
        BatchFields(labels=None, mask='attention_mask', ignore_index=-100, inputs=None)
    """

    labels: Selector = None
    mask: Selector = None
    ignore_index: int | None = None
    inputs: Callable[[Any], Any] | None = None

    def positions(self, batch: Any, *, needs_labels: bool) -> Positions:
        """Select labels and mask of ``batch``; positions with the ignored label are left out of the mask.

        Args:
            batch: as ``training_step`` gets it.
            needs_labels: whether a loss reads labels.
        """
        mask = None if self.mask is None else select(batch, self.mask, f"BatchFields(mask={self.mask!r})").bool()
        labels = None
        if needs_labels or self.ignore_index is not None:
            labels = labels_of(batch, self.labels, f"BatchFields(labels={self.labels!r})")
        if self.ignore_index is not None and labels is not None:
            counted = labels != self.ignore_index
            mask = counted if mask is None else mask & counted
        return Positions(labels, mask)

    def teacher_inputs(self, call: ForwardCall, batch: Any) -> ExampleInput:
        """Select what the teacher is called with.

        Args:
            call: of the student.
            batch: as ``training_step`` gets it.
        """
        if self.inputs is None:
            return ExampleInput(call.args, call.kwargs)
        return ExampleInput.of(self.inputs(batch))
