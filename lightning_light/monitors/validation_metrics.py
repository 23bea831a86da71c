"""Tell the metrics of the last validation from those of training."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

__all__ = ["ValidationMetrics"]


class ValidationMetrics:
    """Keep the metrics that a validation has logged, out of all metrics before and after it.

    Example:
        >>> import torch
        >>> metrics, seen = ValidationMetrics(), {"train_loss": torch.tensor(2.0)}
        >>> metrics.start(seen)
        >>> metrics.end(seen | {"val_accuracy": torch.tensor(0.5)})
        >>> metrics.values
        {'val_accuracy': 0.5}
    """

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self._before: dict[str, Tensor] = {}

    def start(self, metrics: Mapping[str, Tensor]) -> None:
        """Note the metrics before a validation; a value that it logs is another tensor."""
        self._before = dict(metrics)

    def end(self, metrics: Mapping[str, Tensor]) -> None:
        """Keep the metrics that are new or were logged again."""
        logged = {name: value for name, value in metrics.items() if value is not self._before.get(name)}
        self.values = {name: float(value) for name, value in logged.items() if value.numel() == 1}
        self._before = {}
