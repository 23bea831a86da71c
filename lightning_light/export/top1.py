"""Whether a file tells the same classes as the model, over a whole validation set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Labelled", "Top1", "compare_top1"]


@dataclass
class Labelled:
    """One call whose classes are compared.

    Attributes:
        call: what the network is called with.
        labels: the classes that are right, if they are known.
        told: the model's classes, when it has been asked: for another file of the same model it is not asked again.
    """

    call: Any
    labels: Tensor | None = None
    told: Tensor | None = None


@dataclass(frozen=True)
class Top1:
    """Classes that are told: the place of the largest of ``(samples, classes, ...)``.

    Attributes:
        samples: that were asked.
        agreement: share of the answers in which file and model give the same class.
        model: share of the model's that are right; None if no labels are known.
        file: share of the file's that are right.
    """

    samples: int
    agreement: float
    model: float | None
    file: float | None

    def summary(self) -> str:
        """In half a line.

        Example:
            >>> Top1(samples=10_000, agreement=0.9981, model=0.9163, file=0.9161).summary()
            'top-1 of 10000 samples 91.61 % (model 91.63 %), 99.81 % the same'
        """
        right = "" if self.file is None or self.model is None else f" {self.file:.2%} (model {self.model:.2%}),"
        return f"top-1 of {self.samples} samples{right} {self.agreement:.2%} the same".replace("%", " %")


def compare_top1(
    model: Callable[[Any], Any],
    file: Callable[[Any], Any],
    calls: Iterable[tuple[Labelled, Sequence[Any], Sequence[Any]]],
) -> Top1 | None:
    """Ask both for the class of every sample.

    Args:
        model: what is compared with.
        file: what is asked.
        calls: what is compared, the calls of the model that make it up, and those of the file.

    Returns:
        None if there is no call, or the model gives anything else than one floating point tensor
        ``(samples, classes, ...)``.
    """
    samples = answers = same = labelled = right_model = right_file = 0
    for asked, of_model, of_file in calls:
        asked.told = _classes(map(model, of_model)) if asked.told is None else asked.told
        expected, found, labels = asked.told, _classes(map(file, of_file)), asked.labels
        if expected is None or found is None:
            return None
        samples, answers, same = samples + len(found), answers + expected.numel(), same + int((expected == found).sum())
        if labels is not None and labels.shape == expected.shape and not labels.is_floating_point():
            labelled += labels.numel()
            right_model += int((expected == labels.cpu()).sum())
            right_file += int((found == labels.cpu()).sum())
    if not answers:
        return None
    known = labelled == answers
    return Top1(
        samples, same / answers, right_model / labelled if known else None, right_file / labelled if known else None
    )


def _classes(said: Iterable[Any]) -> Tensor | None:
    """Of every sample, in the answers to one part after the other."""
    parts = []
    for answer in said:
        value = answer[0] if isinstance(answer, list | tuple) and len(answer) == 1 else answer
        fits = isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1 and value.shape[1] > 1
        if not fits:
            return None
        parts.append(value.argmax(1).cpu())
    return torch.cat(parts)
