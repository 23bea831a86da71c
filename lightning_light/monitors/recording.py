"""Define the base class of callbacks that record the network over a run, and change nothing in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from typing_extensions import override

from lightning_light.callback import CompressionCallback
from lightning_light.event_log import HISTORY
from lightning_light.measure.snapshot import layer_stats
from lightning_light.monitors.recorder import CostCounter, PlainRecorder, Recorder, is_countable
from lightning_light.order import Stage
from lightning_light.progress import steps_done
from lightning_light.surgery.stored_example import restore_or_capture_example, store_example
from lightning_light.targets import Targets, as_targets

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor, nn

    from lightning_light.measure.history import History
    from lightning_light.measure.snapshot import Snapshot

__all__ = ["RecordingCallback", "ValidationMetrics"]


class RecordingCallback(CompressionCallback):
    """Record the network at the start of the first fit, after each change, and at the end.

    Attributes:
        before: after a fit, the network at the start of the first fit.
        after: after a fit, the network at its end.
        history: after a fit, the remaining fraction of each layer over the steps.
    """

    stage: ClassVar[int] = Stage.MONITORS
    state_schema: ClassVar[Any] = PlainRecorder
    structural: ClassVar[bool] = False
    whole_parameters: ClassVar[tuple[str, str] | None] = (
        "each process counts all of them",
        "Leave the monitor out, or use `strategy='ddp'`.",
    )

    layers = cast("Targets | str | Sequence[str] | None", None)  # not annotated, see `CompressionCallback`

    def __init__(self) -> None:
        self._cost_counter: CostCounter | None = None
        self._recorder: Recorder | None = None
        self._validation: ValidationMetrics | None = None
        self._parameters: tuple[nn.Parameter, ...] = ()
        self._last_signature: tuple[Any, ...] = ()
        self.before: Snapshot | None = None
        self.after: Snapshot | None = None
        self.history: History | None = None

    # Lightning's hooks, in the order a run meets them.

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the network before it is compressed."""
        super().on_fit_start(trainer, pl_module)
        self._reset()
        self.before = self.after = self.history = None
        self._validation = ValidationMetrics()
        captured = restore_or_capture_example(pl_module, self.state(pl_module))
        self._cost_counter = CostCounter(captured, type(self).__name__)
        if is_countable(pl_module):
            self._recorder = self._start_recorder(pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note which metrics there are."""
        if self._validation is not None:
            self._validation.start(trainer.callback_metrics)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics that the validation has logged."""
        if self._validation is not None:
            self._validation.end(trainer.callback_metrics)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Store the example input in checkpoints, for a run that is resumed after its last batch."""
        if self._cost_counter is not None:
            store_example(self.state(pl_module), self._cost_counter.captured)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the network for a checkpoint that is saved after the run."""
        if self._recorder is not None:
            self.record(trainer, pl_module)

    # For subclasses.

    def record(self, trainer: Trainer, pl_module: LightningModule) -> Recorder:
        """Record the network as it is now, and keep the record in the checkpoint."""
        if self._recorder is None:  # lazy layers have shapes after the first forward pass
            self._recorder = self._start_recorder(pl_module)
        self._update(trainer, pl_module, self._recorder)
        self.state(pl_module).update(self._recorder.plain())
        self._parameters = tuple(pl_module.parameters())
        self._last_signature = self._signature(pl_module)
        return self._recorder

    def has_changed(self, pl_module: LightningModule) -> bool:
        """Check whether a method has changed the network since the last record."""
        return self._last_signature != self._signature(pl_module)

    def conclude(self, trainer: Trainer, pl_module: LightningModule) -> Recorder | None:
        """Record the network after the fit, and set the attributes; None if it was never countable."""
        recorder = self._recorder
        if recorder is not None:
            self._update(trainer, pl_module, recorder)
            self.before, self.after, self.history = recorder.before, recorder.now, recorder.history
        return recorder

    def events(self, pl_module: LightningModule) -> list[dict[str, Any]]:
        """Return the events of all methods since the first fit."""
        found: list[dict[str, Any]] = self.compression_state(pl_module).state.get(HISTORY, {}).get("events", [])
        return found

    # Private.

    def _reset(self) -> None:
        if self._cost_counter is not None:
            self._cost_counter.captured.remove()
        self._cost_counter = self._recorder = self._validation = None
        self._parameters, self._last_signature = (), ()

    def _start_recorder(self, pl_module: LightningModule) -> Recorder:
        """Restore the recorder of a checkpoint, or start one."""
        layers = None if self.layers is None else list(as_targets(self.layers).select(pl_module))
        assert self._cost_counter is not None
        cost, state = self._cost_counter(pl_module), self.state(pl_module)
        if "before" in state:
            return Recorder.from_plain(state, pl_module, cost)
        recorder = Recorder(pl_module, cost, layers=layers)
        state.update(recorder.plain())
        return recorder

    def _update(self, trainer: Trainer, pl_module: LightningModule, recorder: Recorder) -> None:
        cost = None if self._cost_counter is None else self._cost_counter(pl_module)
        stats = layer_stats(self.compression_state(pl_module).state)
        recorder.update(pl_module, cost, steps_done(trainer), stats)

    def _signature(self, pl_module: LightningModule) -> tuple[Any, ...]:
        """Return a cheap value that changes with the structure, and with every event of a method."""
        edits = len(self.compression_state(pl_module).edit_log)
        return edits, len(self.events(pl_module)), [parameter.shape for parameter in self._parameters]


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
