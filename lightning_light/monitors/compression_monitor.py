"""Log the cost of a network while it is compressed, and print a table of its layers at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from lightning_light.formatting import human_bytes, human_count
from lightning_light.host.classes import is_host
from lightning_light.host.modules import add_hparams, logs_hparams
from lightning_light.host.patches import InstancePatch
from lightning_light.host.trainer import callbacks_of
from lightning_light.measure import compression_table, deflated_bytes
from lightning_light.measure.sparsity import mask_churn
from lightning_light.monitors.dashboard import add_events, add_heat_maps, add_histograms, add_layout
from lightning_light.monitors.recording import RecordingCallback
from lightning_light.monitors.results import defer_hparams, final_metrics, log_table, method_hparams
from lightning_light.monitors.scalars import (
    COSTS,
    DETAILS,
    PREFIX,
    custom_layout,
    extra_scalars,
    layer_scalars,
    planned_scalars,
    remaining_scalars,
    total_scalars,
)
from lightning_light.progress import epochs_planned, steps_done, training_progress
from lightning_light.targets import Targets
from lightning_light.terminal import above_progress_bar
from lightning_light.validation import PositiveInt, validated

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor

    from lightning_light.measure.snapshot import Snapshot
    from lightning_light.monitors.recorder import Recorder

__all__ = ["CompressionMonitor"]


@validated
@dataclass(eq=False, repr=False)
class CompressionMonitor(RecordingCallback):
    """Log the cost of a network while it is compressed, and print a table of every layer before and after.

    Every logger gets the totals ``compression/macs``, ``params`` and ``size``, from their first change on ``sparsity``
    and ``bits``, beside them what the schedule of a budget planned (``macs_planned``), and the number of events so far
    (``events``); under ``compression_layers/<quantity>/<layer>`` what changes of a layer; and under
    ``compression_details`` what only some methods change (``dead_filters``, ``churn`` of masks, ``effective_macs`` of
    nonzero weights), at Lightning's own steps. Fake-quantized weights count as they will be stored. The final table is
    an artifact. TensorBoard also gets the events as text, histograms of weights, a heat map of the layers, a page of
    Custom Scalars, and hyper-parameters together with the final metrics, so that the runs of a sweep can be compared.

    The totals are in ``trainer.callback_metrics`` too, with their remaining fractions (``compression/macs_remaining``).
    The progress bar shows what has changed: ``macs`` and ``params`` as remaining fractions, ``sparsity``, ``bits``.

    "Before" is the network at the start of the first fit; it is in every checkpoint, so a resumed run compares with
    the same. The run is equal to the last bit with and without the monitor. MACs are per sample.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> monitor = CompressionMonitor(layers=["net.conv*", "net.fc"], table=False)
        >>> trainer = Trainer(callbacks=[monitor], fast_dev_run=True, accelerator="cpu", enable_progress_bar=False,
        ...                   enable_model_summary=False)
        >>> trainer.fit(module, data, data)
        >>> trainer.callback_metrics["compression/macs_remaining"]
        tensor(1.)

    Args:
        every_n_steps: optimizer steps between two records; None: the Trainer's ``log_every_n_steps``. Structural
            changes are always recorded.
        layers: which layers have curves, histograms and a line of their own: names or patterns as in `Targets`; None:
            all that have a weight of two or more dimensions. A layer that is replaced is followed by its replacement.
        per_layer: log curves of each layer, not only of the whole network.
        histograms: log histograms of each layer's weights to TensorBoard, once per epoch.
        heat_map: log a heat map of the layers to TensorBoard, once per epoch.
        layout: add a ``Compression`` section to TensorBoard's Custom Scalars, beside the user's.
        hparams: add the methods and their budgets to the hyper-parameters of the loggers.
        deflate: at the end, measure the size of the parameters and buffers after lossless compression; not of a
            fake-quantized network, whose weights are still float.
        progress_bar: show what has changed in the progress bar.
        table: print the table of every layer before and after at the end of fit.

    Attributes:
        before: after a fit, the network at the start of the first fit.
        after: after a fit, the network at its end.
        history: after a fit, the remaining fraction of each layer over the steps.

    Raises:
        ValueError: ``every_n_steps`` is below 1.
        TargetError: ``layers`` matches no layer of the model.
        UnsupportedError: the strategy shards the parameters.
    """

    method: ClassVar[str] = "compression_monitor"

    _: KW_ONLY
    every_n_steps: PositiveInt | None = None
    layers: Targets | str | Sequence[str] | None = None
    per_layer: bool = True
    histograms: bool = True
    heat_map: bool = True
    layout: bool = True
    hparams: bool = True
    deflate: bool = True
    progress_bar: bool = True
    table: bool = True

    def __post_init__(self) -> None:
        super().__init__()
        self._last_step: int | None = None  # of the last record
        self._masks: Mapping[str, Tensor] | None = None  # copies, of the last record
        self._patches: tuple[InstancePatch, ...] = ()
        self._curves: frozenset[str] = COSTS  # tags that have changed, and those of costs
        self._events_written = 0

    # Lightning's hooks, in the order a run meets them.

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the network before it is compressed, and add the budgets to the hyper-parameters."""
        super().on_fit_start(trainer, pl_module)
        self._events_written = len(self.events(pl_module))
        if self.hparams and trainer.is_global_zero:
            self._patches = self._add_hparams(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the user's hyper-parameters, which Lightning has logged by now."""
        super().on_train_start(trainer, pl_module)
        self._remove_hparams()
        self._last_step = None
        self._masks = self._copy_masks(pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the network if that is due or a method has changed it; every method has acted by now."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if not self._is_due(trainer, pl_module):
            return
        recorder = self.record(trainer, pl_module)
        self._log_scalars(trainer, pl_module, recorder)
        self._log_metrics(pl_module, recorder)
        self._last_step = steps_done(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write histograms and heat maps."""
        if self._recorder is not None:
            self._draw(trainer, pl_module, self._recorder)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Report the result, after other callbacks have exported and converted in ``on_fit_end``."""
        super().teardown(trainer, pl_module, stage)
        self._remove_hparams()
        if stage == "fit" and self._recorder is not None:
            self._report(trainer, pl_module)
        self._reset()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Log the metrics that there are; the base class releases the module."""
        if self._recorder is not None:
            self._log_final_metrics(trainer, self._recorder.now)
        super().on_exception(trainer, pl_module, exception)

    # Private: when to record, and what.

    @override
    def _reset(self) -> None:
        super()._reset()
        self._last_step = self._masks = None
        self._curves = COSTS

    def _is_due(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        step = steps_done(trainer)
        if self._last_step is None:
            return True
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
        on_time = every > 0 and step % every == 0 and step != self._last_step
        return on_time or self.has_changed(pl_module)

    def _copy_masks(self, pl_module: LightningModule) -> dict[str, Tensor]:
        """Copy the masks of every method from the compression state."""
        masks_of_methods = [state.get("masks", {}) for state in self.compression_state(pl_module).state.values()]
        return {name: mask.clone() for masks in masks_of_methods for name, mask in masks.items()}

    def _churn(self, pl_module: LightningModule) -> dict[str, float]:
        """Return the fraction of mask entries that has changed since the last record; nothing without masks."""
        before, self._masks = self._masks or {}, self._copy_masks(pl_module)
        return {f"{DETAILS}/churn": mask_churn(before, self._masks)} if before or self._masks else {}

    # Private: where it is written.

    def _log_scalars(self, trainer: Trainer, pl_module: LightningModule, recorder: Recorder) -> None:
        """Log to every logger at Lightning's own steps, not through ``self.log`` and its intervals."""
        churn, events = self._churn(pl_module), self.events(pl_module)
        if not trainer.is_global_zero:
            return
        step, first, now = steps_done(trainer), *(self._parts(one, recorder) for one in (recorder.before, recorder.now))
        begun = {tag for tag, value in now.items() if value != first.get(tag)} - self._curves
        earlier = {tag: first[tag] for tag in begun if tag in first}
        is_resumed = self._last_step is None and step > 1  # what was before its first step is in another file
        for past in sorted({recorder.history.steps[0], *([] if is_resumed else [step - 1])}) if earlier else ():
            if past < step:  # so that a curve begins flat, and falls at the step of the change
                _log(trainer, earlier, past)
        self._curves |= begun
        scalars = {
            **self._planned(trainer, pl_module),
            **churn,
            **{tag: now[tag] for tag in now if tag in self._curves},
        }
        if events:
            scalars[f"{PREFIX}/events"] = float(len(events))
        _log(trainer, scalars, step)
        for writer, folder in self._tensorboards(trainer):
            add_events(writer, events[self._events_written :])
            if self.layout and (begun or self._last_step is None):
                add_layout(writer, folder, custom_layout(scalars.keys()))
        self._events_written = len(events)

    def _parts(self, snapshot: Snapshot, recorder: Recorder) -> dict[str, float]:
        """Return all scalars; those that are not of costs are logged from their first change on."""
        layers = layer_scalars(snapshot, recorder.layers) if self.per_layer else {}
        return total_scalars(snapshot) | extra_scalars(snapshot) | layers

    def _planned(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        callbacks, dense = callbacks_of(trainer), self.compression_state(pl_module).references
        if not any(hasattr(callback, "budget") for callback in callbacks):
            return {}  # the run may have no planned end
        return planned_scalars(callbacks, dense, training_progress(trainer), epochs_planned(trainer))

    def _log_metrics(self, pl_module: LightningModule, recorder: Recorder) -> None:
        """Log for other callbacks (``ModelCheckpoint(monitor="compression/macs_remaining")``) and the progress bar."""
        now, before = recorder.now, recorder.before
        remaining = remaining_scalars(now, before)
        for name, value in {**total_scalars(now), **extra_scalars(now), **remaining}.items():
            _log_quietly(pl_module, name, value)
        if self.progress_bar:
            shares = {key: remaining.get(f"{PREFIX}/{key}_remaining", 1.0) for key in ("macs", "params")}
            shown = {key: value for key, value in shares.items() if value != 1.0}
            shown |= {"sparsity": now.sparsity} if now.sparsity != before.sparsity else {}
            shown |= {"bits": now.bits} if now.bits != before.bits else {}
            if "macs" in shown:
                shown.pop("params", None)
            for name, value in shown.items():
                _log_quietly(pl_module, name, round(value, 2), prog_bar=True)

    def _draw(self, trainer: Trainer, pl_module: LightningModule, recorder: Recorder) -> None:
        for writer, _ in self._tensorboards(trainer):
            if self.histograms:
                add_histograms(writer, pl_module, recorder.layers, steps_done(trainer))
            if self.heat_map:
                add_heat_maps(writer, recorder.history, steps_done(trainer))

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        recorder = self.conclude(trainer, pl_module)
        assert recorder is not None
        quantized = any("weight_bits" in numbers for numbers in recorder.now.stats.values())  # the float weights remain
        if self.deflate and trainer.is_global_zero and not quantized:
            self.after = recorder.now = replace(recorder.now, deflated=deflated_bytes(pl_module))
        self._log_scalars(trainer, pl_module, recorder)
        self._draw(trainer, pl_module, recorder)
        self._log_final_metrics(trainer, recorder.now)
        if not trainer.is_global_zero:
            return
        notes = _notes(trainer, recorder.now)
        table = compression_table(recorder.before, recorder.now, layers=recorder.layers, notes=notes)
        for logger in trainer.loggers:
            log_table(logger, table, steps_done(trainer))
        if self.table:
            with above_progress_bar():
                table.write()

    def _tensorboards(self, trainer: Trainer) -> list[tuple[Any, str]]:
        """Return the writer and the folder of each TensorBoard logger, on rank 0 only."""
        return [(logger.experiment, logger.log_dir) for logger in _tensorboard_loggers(trainer)]

    # Private: hyper-parameters. TensorBoard keeps only the first ones of a run, so all have to be logged at once.

    def _add_hparams(self, trainer: Trainer, pl_module: LightningModule) -> tuple[InstancePatch, ...]:
        """Add the methods' budgets to the user's hyper-parameters until Lightning has logged them."""
        methods = method_hparams(callbacks_of(trainer))
        deferred = [defer_hparams(logger) for logger in _tensorboard_loggers(trainer)]
        data = trainer.datamodule  # type: ignore[attr-defined]  # set by a connector
        for owner in (pl_module, data):
            if logs_hparams(owner):
                missing = not methods.keys() <= owner.hparams_initial.keys()  # else another monitor has done it
                return (*deferred, add_hparams(owner, methods)) if missing else tuple(deferred)
        for logger in trainer.loggers:
            logger.log_hyperparams(methods)
        return tuple(deferred)

    def _remove_hparams(self) -> None:
        for patch in self._patches:
            patch.undo()
        self._patches = ()

    def _log_final_metrics(self, trainer: Trainer, now: Snapshot) -> None:
        """Write the hyper-parameters of TensorBoard's page together with the results."""
        if not self.hparams or self._validation is None:
            return
        metrics = final_metrics(now, self._validation.values, callbacks_of(trainer))
        for logger in _tensorboard_loggers(trainer):
            if logger.hparams:
                logger.log_hyperparams(dict(logger.hparams), metrics, steps_done(trainer))


def _tensorboard_loggers(trainer: Trainer) -> list[Any]:
    loggers: list[Any] = trainer.loggers if trainer.is_global_zero else []
    return [each for each in loggers if is_host(each, "loggers.TensorBoardLogger")]


def _log(trainer: Trainer, scalars: dict[str, float], step: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(scalars, step=step)


def _log_quietly(pl_module: LightningModule, name: str, value: float, *, prog_bar: bool = False) -> None:
    pl_module.log(name, value, prog_bar=prog_bar, logger=False, on_step=True, on_epoch=False, batch_size=1)


def _notes(trainer: Trainer, now: Snapshot) -> list[str]:
    """Return the lines below the table: exported files, effective MACs, compressed size, and what is unknown."""
    reports: list[Any] = [getattr(callback, "report", None) for callback in callbacks_of(trainer)]
    notes = [f"exported: {report.summary()}" for report in reports if callable(getattr(report, "summary", None))]
    if now.sparsity and now.effective_macs is not None:
        notes.append(f"effective MACs (nonzero weights): {human_count(now.effective_macs)}")
    if now.deflated is not None:
        notes.append(f"size after compression (DEFLATE): {human_bytes(now.deflated)}")
    if now.macs is None:
        notes.append("MACs are unknown: no input of `forward` was found. Set the module's `example_input_array`.")
    return notes
