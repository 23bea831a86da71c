"""Metrics of torchmetrics: those that a module holds, those that a user gives, and top-1 agreement of two networks."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from typing_extensions import override

__all__ = ["MetricLike", "Top1Agreement", "local_copy", "metric_values", "metrics_of", "was_updated"]

MetricLike = Metric | MetricCollection


class Top1Agreement(Metric):
    """Share of predictions in which two networks have the same most probable class.

    ``update`` takes the outputs of both: scores whose dimension ``class_dim`` counts classes.

    Args:
        class_dim: which dimension counts classes: 1 for ``(N, C)`` and ``(N, C, H, W)``, -1 for tokens ``(N, T, C)``.

    Example:
        >>> agreement = Top1Agreement()
        >>> agreement.update(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([[0.3, 0.7], [0.4, 0.6]]))
        >>> agreement.compute()
        tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    equal: Tensor
    total: Tensor

    def __init__(self, class_dim: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.class_dim = class_dim
        self.add_state("equal", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @override
    def update(self, outputs: Tensor, reference: Tensor) -> None:
        """Count the predictions of a batch.

        Args:
            outputs: scores of one network.
            reference: scores of the other, of the same shape.
        """
        same = outputs.argmax(self.class_dim) == reference.argmax(self.class_dim)
        self.equal += same.sum()
        self.total += same.numel()

    @override
    def compute(self) -> Tensor:
        """Return the share in [0, 1]; NaN before the first update."""
        return self.equal / self.total


def metrics_of(model: nn.Module) -> dict[str, MetricLike]:
    """Return the metrics that ``model`` holds, by path; of a collection the collection, not its members.

    Example:
        >>> from torchmetrics.classification import MulticlassAccuracy
        >>> module = nn.Sequential(nn.Linear(2, 3), MulticlassAccuracy(3), MetricCollection([MulticlassAccuracy(3)]))
        >>> {path: type(metric).__name__ for path, metric in metrics_of(module).items()}
        {'1': 'MulticlassAccuracy', '2': 'MetricCollection'}
    """
    found: dict[str, MetricLike] = {}
    for path, module in model.named_modules():
        is_member = any(outer == "" or path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, Metric | MetricCollection) and not is_member:
            found[path] = module
    return found


def local_copy(metric: MetricLike) -> MetricLike:
    """Copy a metric: without its state, and computed in this process alone where several processes run."""
    copied = copy.deepcopy(metric)
    copied.reset()
    for part in copied.modules():
        if isinstance(part, Metric):
            part.distributed_available_fn = _never
    return copied


def was_updated(metric: MetricLike) -> bool:
    """Whether ``update`` was called since the metric was made or reset."""
    members = metric.values() if isinstance(metric, MetricCollection) else [metric]
    return any(member.update_called for member in members)


def metric_values(metrics: Mapping[str, MetricLike]) -> dict[str, float]:
    """Compute the updated metrics, as numbers by name.

    A vector, for instance one value per class, has a name for each of its elements; matrices and curves are left out.

    Args:
        metrics: name -> metric or collection. The name ``""`` is left out of the names of a collection's members.

    Example:
        >>> from torchmetrics.classification import MulticlassAccuracy
        >>> accuracy = MulticlassAccuracy(2, average=None)
        >>> accuracy.update(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]))
        >>> metric_values({"accuracy": accuracy})
        {'accuracy/0': 0.5, 'accuracy/1': 1.0}
    """
    return {
        name: value
        for path, metric in metrics.items()
        if was_updated(metric)
        for name, value in _numbers(path, metric.compute())
    }


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(f"{name}/{key}" if name else str(key), item)
    elif isinstance(value, Tensor) and value.numel() == 1:
        yield name, float(value)
    elif isinstance(value, Tensor) and value.ndim == 1:
        yield from ((f"{name}/{place}", number) for place, number in enumerate(value.tolist()))
    elif isinstance(value, float | int):
        yield name, float(value)


def _never() -> bool:
    return False
