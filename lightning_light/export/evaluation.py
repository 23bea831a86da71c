"""Compute metrics of torchmetrics for a model and for its exported file, on the same data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_light.example_input import ExampleInput, example_of_batch
from lightning_light.export.inputs import Positional
from lightning_light.measure.metrics import MetricLike, Top1Agreement, local_copy, metric_values
from lightning_light.selectors import labels_of

__all__ = ["DataEvaluator", "Evaluation", "Evaluator", "MetricComparison", "MetricInputs", "PairedMetrics"]

MetricInputs = Callable[[Any, Any], tuple[Any, ...]]
"""(outputs of the network, batch) -> arguments of the metric's ``update``."""


@dataclass(frozen=True)
class MetricComparison:
    """One metric of the model and of the file.

    Attributes:
        model: the model's value.
        file: the file's value.
        difference: ``file - model``.
    """

    model: float
    file: float
    difference: float


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a model and of its exported file.

    Attributes:
        metrics: name -> values.
        top1_agreement: share of predictions with the same most probable class; None if the outputs are not class
            scores or the batches have no class labels.
        batches: that were evaluated.

    Example:
        >>> evaluation = Evaluation({"accuracy": MetricComparison(0.9163, 0.9161, -0.0002)}, 0.9981, batches=100)
        >>> evaluation.summary()
        'accuracy 0.9161 (model 0.9163, difference -0.0002), top-1 agreement 0.9981'
    """

    metrics: dict[str, MetricComparison] = field(default_factory=dict)
    top1_agreement: float | None = None
    batches: int = 0

    def summary(self) -> str:
        """Return the metrics in one line."""
        parts = [
            f"{name} {value.file:.4g} (model {value.model:.4g}, difference {value.difference:.2g})"
            for name, value in self.metrics.items()
        ]
        if self.top1_agreement is not None:
            parts.append(f"top-1 agreement {self.top1_agreement:.4g}")
        return ", ".join(parts)


class Evaluator(ABC):
    """Runs a model and its file on the same data."""

    @abstractmethod
    def __call__(self, model: Callable[..., Any], file: Callable[..., Any], positional: Positional) -> Evaluation:
        """Compute the metrics.

        Args:
            model: called as the model is.
            file: called as the model is.
            positional: determines which calls the file takes.
        """


class PairedMetrics:
    """Metrics of the model and the same ones of the file, and the agreement of both.

    Args:
        of_model: name -> metric; changed in place.
        of_file: the same for the file.
    """

    def __init__(self, of_model: Mapping[str, MetricLike], of_file: Mapping[str, MetricLike]) -> None:
        self.of_model, self.of_file = of_model, of_file
        self._agreement: MetricLike | None = None

    @classmethod
    def of(cls, metrics: MetricLike | None) -> PairedMetrics:
        """Copy a metric or collection that the user gives, for the model and for the file."""
        if metrics is None:
            return cls({}, {})
        name = "" if hasattr(metrics, "keys") else type(metrics).__name__
        return cls({name: local_copy(metrics)}, {name: local_copy(metrics)})

    def update(self, model: tuple[Any, ...], file: tuple[Any, ...]) -> None:
        """Update the metrics with the arguments of their ``update``."""
        for metrics, arguments in ((self.of_model, model), (self.of_file, file)):
            for metric in metrics.values():
                metric.update(*arguments)

    def update_agreement(self, model: Any, file: Any, batch: Any) -> None:
        """Count equal classes in two outputs for a batch, if they are class scores of its labels."""
        class_dim = _class_dim(model, batch)
        if class_dim is None:
            return
        if self._agreement is None:
            self._agreement = local_copy(Top1Agreement(class_dim))
        self._agreement.update(file, model)

    def evaluation(self, batches: int) -> Evaluation:
        """Compute all values."""
        model, file = metric_values(self.of_model), metric_values(self.of_file)
        compared = {
            name: MetricComparison(value, file[name], file[name] - value)
            for name, value in model.items()
            if name in file
        }
        agreement = metric_values({"agreement": self._agreement}) if self._agreement else {}
        return Evaluation(compared, agreement.get("agreement"), batches)


@dataclass(frozen=True, eq=False)
class DataEvaluator(Evaluator):
    """Evaluates batches ``(inputs, target)``; batches without a target are left out.

    Args:
        network: the model, whose device and type inputs are moved to.
        data: the batches.
        metrics: updated with the outputs and the target.
        metric_inputs: the arguments of ``update``, if they are others.
    """

    network: nn.Module
    data: Iterable[Any]
    metrics: MetricLike | None = None
    metric_inputs: MetricInputs | None = None

    @override
    def __call__(self, model: Callable[..., Any], file: Callable[..., Any], positional: Positional) -> Evaluation:
        paired, inputs, batches = PairedMetrics.of(self.metrics), self.metric_inputs or outputs_and_labels, 0
        for batch in self.data:
            call = example_of_batch(batch, self.network)
            if isinstance(batch, ExampleInput | Tensor):
                continue
            of_model, of_file = model(*call.args, **call.kwargs), file(*call.args, **call.kwargs)
            if self.metrics is not None:
                paired.update(inputs(of_model, batch), inputs(of_file, batch))
            paired.update_agreement(of_model, of_file, batch)
            batches += 1
        return paired.evaluation(batches)


def outputs_and_labels(outputs: Any, batch: Any) -> tuple[Any, ...]:
    """Return the usual arguments of ``update``: (outputs, labels of the batch)."""
    return outputs, labels_of(batch, None, "metrics=...")


def _class_dim(outputs: Any, batch: Any) -> int | None:
    """The dimension of ``outputs`` that counts classes, found by the shape of the batch's integer labels."""
    labels = _integer_labels(batch)
    if labels is None or not isinstance(outputs, Tensor) or not outputs.is_floating_point() or outputs.dim() < 2:
        return None
    for dim in (1, -1):
        shape = list(outputs.shape)
        if shape.pop(dim) > 1 and shape == list(labels.shape):
            return dim
    return None


def _integer_labels(batch: Any) -> Tensor | None:
    try:
        labels = labels_of(batch, None, "metrics=...")
    except ValueError:  # a batch without labels
        return None
    return None if labels.is_floating_point() else labels
