"""Metrics of torchmetrics for the exported file and for the module, for any task."""

from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassJaccardIndex

from lightning_light.errors import UnsupportedError
from lightning_light.export import ExportReport, MobileExport, export_model
from lightning_light.measure.metrics import metric_values, metrics_of
from lightning_light.quantization import Int8, QuantizationAwareTraining
from tests.export.nets import HOSTS
from tests.zoo import noise, tokens

CLASSES = 3


class BoxError(Metric):
    """Mean distance of box corners, of dicts as detectors return them."""

    error: Tensor
    boxes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("error", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("boxes", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, found: list[dict[str, Tensor]], targets: list[dict[str, Tensor]]) -> None:
        for one, target in zip(found, targets, strict=True):
            self.error += (one["boxes"] - target["boxes"]).abs().mean()
            self.boxes += 1

    def compute(self) -> Tensor:
        return self.error / self.boxes


class Task(nn.Module):
    """Steps of a LightningModule; subclasses say how a batch is evaluated."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def loss(self, batch: Any) -> Tensor:
        raise NotImplementedError


class Classification(Task):
    """Pairs of images and labels; a metric that is logged, and a collection."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(6, CLASSES)
        self.train_accuracy = MulticlassAccuracy(CLASSES)  # never updated in validation
        self.accuracy = MulticlassAccuracy(CLASSES)
        scores: dict[str, Any] = {"f1": MulticlassF1Score(CLASSES), "recall": MulticlassAccuracy(CLASSES, average=None)}
        self.scores = MetricCollection(scores)
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.scores.update(logits, batch[1])
        self.log("accuracy", self.accuracy)
        if self.logger is not None:
            self.logger.experiment.add_scalar("steps", 1.0, self.steps)
            self.steps += 1


class Segmentation(Task):
    """Labels of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(3, CLASSES, 3, padding=1)
        self.iou = MulticlassJaccardIndex(CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch["image"]), batch["labels"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.iou.update(self(batch["image"]), batch["labels"])


class Regression(Task):
    """Two inputs by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1)
        self.errors = nn.ModuleDict({"squared": MeanSquaredError(), "absolute": MeanAbsoluteError()})

    def forward(self, x: Tensor, *, shift: Tensor) -> Tensor:
        return self.net(x)[:, 0] + shift

    def loss(self, batch: Any) -> Tensor:
        return F.mse_loss(self(batch[0], shift=batch[1]), batch[2])

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        prediction = self(batch[0], shift=batch[1])
        for error in self.errors.values():
            error.update(prediction, batch[2])
        return F.mse_loss(prediction, batch[2])


class Detection(Task):
    """A dict of outputs, and lists of dicts for the metric."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.boxes, self.labels = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.box_error = BoxError()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.net(images).mean((2, 3))
        return {"scores": self.labels(features), "boxes": self.boxes(features).sigmoid()}

    def loss(self, batch: Any) -> Tensor:
        found = self(batch["images"])
        return F.l1_loss(found["boxes"], batch["boxes"]) + F.cross_entropy(found["scores"], batch["classes"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        found = self(batch["images"])
        self.box_error.update([{"boxes": box} for box in found["boxes"]], [{"boxes": box} for box in batch["boxes"]])


def samples(task: type[Task], count: int = 12) -> list[Any]:
    """Samples as the task's steps take them."""
    images, classes = noise(count, 3, 8, 8), tokens(count, below=CLASSES)
    if task is Classification:
        return list(zip(images, classes, strict=True))
    if task is Segmentation:
        labels = tokens(count, 8, 8, below=CLASSES)
        return [{"image": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    if task is Regression:
        return list(zip(noise(count, 4), noise(count), noise(count) + 1, strict=True))
    boxes = noise(count, 4).sigmoid()
    parts = zip(images, boxes, classes, strict=True)
    return [{"images": image, "boxes": box, "classes": label} for image, box, label in parts]


NAMES = {
    Classification: {"accuracy", "scores/f1", *(f"scores/recall/{place}" for place in range(CLASSES))},
    Segmentation: {"iou"},
    Regression: {"errors.squared", "errors.absolute"},
    Detection: {"box_error"},
}


def module_of(task: type[Task], host: Any = lightning.pytorch) -> Any:
    """A LightningModule of the host with the steps of ``task``."""
    torch.manual_seed(0)
    return type(task.__name__, (task, host.LightningModule), {})()


def fit(module: Any, task: type[Task], *exports: Any, host: Any = lightning.pytorch, **options: Any) -> Any:
    """Train one epoch."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    run = host.Trainer(callbacks=list(exports), **{**quiet, **options})
    data = DataLoader(samples(task), batch_size=5)
    run.fit(module, data, data)
    return run


def expected(module: Any, task: type[Task]) -> dict[str, float]:
    """The metrics of the module over the validation set, computed by its own Trainer."""
    values: dict[str, float] = {}

    class Compute(lightning.pytorch.Callback):
        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            values.update(metric_values(metrics_of(pl_module)))

    off = ("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary")
    for metric in metrics_of(module).values():
        metric.reset()
    trainer = lightning.pytorch.Trainer(accelerator="cpu", callbacks=[Compute()], **dict.fromkeys(off, False))
    trainer.validate(module, DataLoader(samples(task), batch_size=5), verbose=False)
    return values


def tasks_and_formats() -> list[Any]:
    """Every task in two formats; a third one is slow."""
    formats = [".ptl", ".onnx", ".pte"]
    marks = {(number, formats[1 + number % 2]): pytest.mark.slow for number in range(len(NAMES))}
    return [
        pytest.param(task, suffix, id=f"{task.__name__}-{suffix}", marks=marks.get((number, suffix), ()))
        for number, task in enumerate(NAMES)
        for suffix in formats
    ]


@pytest.mark.parametrize(("task", "suffix"), tasks_and_formats())
def test_metrics_of_the_module_are_computed_for_the_file(task: type[Task], suffix: str, tmp_path: Path) -> None:
    export = MobileExport(tmp_path / f"model{suffix}", latency_runs=1)
    module = module_of(task)
    fit(module, task, export)
    assert export.report is not None
    evaluation = export.report.evaluation
    assert evaluation is not None
    assert evaluation.batches == 3
    assert evaluation.metrics.keys() == NAMES[task]
    right = expected(module, task)
    for name, value in evaluation.metrics.items():
        assert value.model == pytest.approx(right[name], abs=1e-6)
        assert value.file == pytest.approx(right[name], abs=1e-4)
        assert value.difference == value.file - value.model
        assert f"{name} {value.file:.4g} (model {value.model:.4g}" in export.report.summary()
    assert (evaluation.top1_agreement == 1.0) == (task in (Classification, Segmentation))
    assert ExportReport.read(f"{export.path}.json") == export.report


def test_given_metrics_are_updated_with_outputs_and_labels(tmp_path: Path) -> None:
    metrics = MetricCollection({"top2": MulticlassAccuracy(CLASSES, top_k=2), "f1": MulticlassF1Score(CLASSES)})
    export = MobileExport(tmp_path / "model.ptl", metrics=metrics, metric_batches=2, latency_runs=1)
    module = module_of(Classification)
    fit(module, Classification, export)
    assert export.report is not None
    assert export.report.evaluation is not None
    with torch.no_grad():
        for images, labels in list(DataLoader(samples(Classification), batch_size=5))[:2]:
            metrics.update(module.eval()(images), labels)
    found = {name: value.file for name, value in export.report.evaluation.metrics.items()}
    assert found == pytest.approx(metric_values({"": metrics}), abs=1e-4)


def test_arguments_of_update_are_selected_by_a_function(tmp_path: Path) -> None:
    export = MobileExport(
        tmp_path / "model.ptl",
        metrics=MeanAbsoluteError(),
        metric_inputs=lambda outputs, batch: (outputs["boxes"], batch["boxes"]),
        latency_runs=1,
    )
    fit(module_of(Detection), Detection, export)
    assert export.report is not None
    assert export.report.evaluation is not None
    assert export.report.evaluation.metrics.keys() == {"MeanAbsoluteError"}


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.__name__)
def test_nothing_is_logged_and_no_metric_of_the_module_changes(host: Any, tmp_path: Path) -> None:
    logged = []
    for export in ([], [MobileExport(tmp_path / "model.ptl", latency_runs=1)]):
        logger = host.loggers.TensorBoardLogger(tmp_path, name=str(len(export)), version=0)
        module = module_of(Classification, host)
        run = fit(module, Classification, *export, host=host, logger=logger)
        logger.experiment.flush()
        events = sorted(tmp_path.glob(f"{len(export)}/0/events*"))
        logged.append((sum(file.stat().st_size for file in events), dict(run.callback_metrics), module.steps))
        assert run.loggers == [logger]
        assert not module.accuracy.update_called
    assert logged[0] == logged[1]


class Inside(Classification):
    """Calls a part of itself, which the file cannot replace."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.accuracy.update(self.head(self.net(batch[0])), batch[1])


def test_a_step_that_does_not_call_the_module_has_no_metrics(tmp_path: Path) -> None:
    export = MobileExport(tmp_path / "model.ptl", metrics=MulticlassAccuracy(CLASSES), latency_runs=1)
    with pytest.raises(UnsupportedError, match=r"to call the module, `self\(...\)`.*`metric_batches=0`"):
        fit(module_of(Inside), Classification, export)
    export = MobileExport(tmp_path / "other.ptl", latency_runs=1)
    fit(module_of(Inside), Classification, export)
    assert export.report is not None
    assert export.report.evaluation is None


class NeedsLoop(Classification):
    """Fails outside of the Trainer's validation loop."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if not self.trainer.validating:
            raise RuntimeError("not validating")


def test_a_step_that_fails_outside_of_the_loop_is_a_warning_unless_metrics_are_given(tmp_path: Path) -> None:
    export = MobileExport(tmp_path / "model.ptl", latency_runs=1)
    with pytest.warns(UserWarning, match="found RuntimeError: not validating.*`metric_batches=0`"):
        fit(module_of(NeedsLoop), Classification, export)
    assert export.report is not None
    assert export.report.evaluation is not None
    assert not export.report.evaluation.metrics
    export = MobileExport(tmp_path / "other.ptl", metrics=MulticlassAccuracy(CLASSES), latency_runs=1)
    with pytest.raises(UnsupportedError, match="not validating"):
        fit(module_of(NeedsLoop), Classification, export)


def test_metrics_can_be_switched_off(tmp_path: Path) -> None:
    export = MobileExport(tmp_path / "model.ptl", metric_batches=0, latency_runs=1)
    fit(module_of(Classification), Classification, export)
    assert export.report is not None
    assert export.report.evaluation is None


def test_the_function_evaluates_data(tmp_path: Path) -> None:
    model, data = Classification(), list(DataLoader(samples(Classification), batch_size=5))
    accuracy = MulticlassAccuracy(CLASSES, average="micro")
    report = export_model(model, data[0][0], tmp_path / "model.onnx", data=iter(data), metrics=accuracy, latency_runs=1)
    assert report.evaluation is not None
    assert report.evaluation.batches == len(data)
    with torch.no_grad():
        for images, labels in data:
            accuracy.update(model.eval()(images), labels)
    (value,) = report.evaluation.metrics.values()
    assert value.file == value.model == pytest.approx(float(accuracy.compute()))
    assert report.evaluation.top1_agreement == 1.0
    assert report.parity_batches == len(data)


@pytest.mark.parametrize("suffix", [".onnx", pytest.param(".pte", marks=pytest.mark.slow)])
def test_metrics_of_an_int8_file(suffix: str, tmp_path: Path) -> None:
    export = MobileExport(tmp_path / f"model{suffix}", latency_runs=1)
    module = module_of(Classification)
    fit(module, Classification, QuantizationAwareTraining(Int8(), start=0.0, calibration_batches=1), export)
    assert export.report is not None
    assert export.report.details["int8_layers"] > 0
    evaluation = export.report.evaluation
    assert evaluation is not None
    assert evaluation.metrics.keys() == NAMES[Classification]
    assert evaluation.top1_agreement is not None
    assert evaluation.top1_agreement >= 0.9
