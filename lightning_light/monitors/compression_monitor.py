"""Log the cost of a network while it is compressed, and print a table of its layers at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from rich.console import Console
from rich.measure import Measurement
from typing_extensions import override

from lightning_light.callback import CompressionCallback
from lightning_light.host.classes import is_host
from lightning_light.host.modules import add_hparams, logs_hparams
from lightning_light.host.patches import InstancePatch
from lightning_light.host.trainer import callbacks_of
from lightning_light.measure.layer_stats import layer_stats
from lightning_light.measure.size import deflated_bytes
from lightning_light.measure.sparsity import mask_churn
from lightning_light.monitors.dashboard import add_heat_maps, add_histograms, add_layout
from lightning_light.monitors.hparams import method_hparams
from lightning_light.monitors.recorder import CostCounter, PlainRecorder, Recorder, is_countable
from lightning_light.monitors.scalars import PREFIX, custom_layout, layer_scalars, total_scalars
from lightning_light.monitors.table import compression_markdown, compression_table, human_bytes, human_count
from lightning_light.order import Stage
from lightning_light.progress import steps_done
from lightning_light.surgery.distributed import refuse_sharding
from lightning_light.surgery.stored_example import restore_or_capture_example, store_example
from lightning_light.targets import Targets, as_targets
from lightning_light.validation import PositiveInt, validated

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from rich.table import Table
    from torch import Tensor, nn

    from lightning_light.monitors.history import History
    from lightning_light.monitors.snapshot import Snapshot

__all__ = ["CompressionMonitor"]


@validated
class CompressionMonitor(CompressionCallback):
    """Log the cost of a network while it is compressed, and print a table of every layer before and after.

    Every logger gets the totals (``compression/params``, ``macs``, ``bytes``, ``sparsity``, ``bits``), their remaining
    fractions (``compression/macs_remaining``, ...), the effect of sparsity (``effective_macs``, ``dead_filters``,
    ``churn`` of masks), and the same per layer (``compression/channels/<layer>``, ...), at Lightning's own steps; and
    the numbers of the methods per layer, such as its rank, the energy kept, and the bits per weight in a coded file.
    TensorBoard also gets histograms of weights, a heat map of the layers, a layout for its Custom Scalars page, and
    the table. The totals are in ``trainer.callback_metrics`` too.

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
        layout: add a ``compression`` section to TensorBoard's Custom Scalars, beside the user's.
        hparams: add the arguments of every compression method to the hyper-parameters of the loggers.
        deflate: at the end, measure the size of the parameters and buffers after lossless compression.
        progress_bar: show the remaining MACs and the sparsity in the progress bar.
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
    stage: ClassVar[int] = Stage.MONITORS
    state_schema: ClassVar[Any] = PlainRecorder
    structural: ClassVar[bool] = False

    _cost_counter: CostCounter | None = None
    _recorder: Recorder | None = None
    _last_step: int | None = None  # of the last record
    _masks: Mapping[str, Tensor] | None = None  # copies, of the last record
    _parameters: tuple[nn.Parameter, ...] = ()
    _last_signature: tuple[Any, ...] = ()
    _hparams_patch: InstancePatch | None = None

    def __init__(
        self,
        *,
        every_n_steps: PositiveInt | None = None,
        layers: Targets | str | Sequence[str] | None = None,
        per_layer: bool = True,
        histograms: bool = True,
        heat_map: bool = True,
        layout: bool = True,
        hparams: bool = True,
        deflate: bool = True,
        progress_bar: bool = True,
        table: bool = True,
    ) -> None:
        self.every_n_steps = every_n_steps
        self.layers = layers
        self.per_layer = per_layer
        self.histograms = histograms
        self.heat_map = heat_map
        self.layout = layout
        self.hparams = hparams
        self.deflate = deflate
        self.progress_bar = progress_bar
        self.table = table
        self.before: Snapshot | None = None
        self.after: Snapshot | None = None
        self.history: History | None = None

    # Lightning's hooks, in the order a run meets them.

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a strategy that shards the parameters."""
        super().setup(trainer, pl_module, stage)
        refuse_sharding(
            trainer,
            "CompressionMonitor",
            "each process counts all of them",
            "Leave the monitor out, or use `strategy='ddp'`.",
        )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the network before it is compressed, and add the methods' arguments to the hyper-parameters."""
        super().on_fit_start(trainer, pl_module)
        self._reset()
        self.before = self.after = self.history = None
        self._cost_counter = CostCounter(restore_or_capture_example(pl_module, self.state(pl_module)))
        if is_countable(pl_module):
            self._recorder = self._start_recorder(pl_module)
        if self.hparams and trainer.is_global_zero:
            self._add_hparams(trainer, pl_module)

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
        """Record the network if that is due or the structure has changed; every method has acted by now."""
        if self._cost_counter is not None:
            store_example(self.state(pl_module), self._cost_counter.captured)
        if not self._is_due(trainer, pl_module):
            return
        recorder = self._record(trainer, pl_module)
        self._log_scalars(trainer, recorder, self._churn(pl_module))
        self._log_metrics(pl_module, recorder)
        if self.layout and self._last_step is None:
            for writer, folder in self._tensorboards(trainer):
                add_layout(writer, folder, custom_layout(per_layer=self.per_layer))
        self._last_step = steps_done(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write histograms and heat maps."""
        if self._recorder is not None:
            self._draw(trainer, pl_module, self._recorder)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the network for a checkpoint that is saved after the run."""
        if self._recorder is not None:
            self._record(trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Report the result, after other callbacks have exported and converted in ``on_fit_end``."""
        super().teardown(trainer, pl_module, stage)
        self._remove_hparams()
        if stage == "fit" and self._recorder is not None:
            self._report(trainer, pl_module, self._recorder)
        self._reset()

    # Private: when to record, and what.

    def _reset(self) -> None:
        if self._cost_counter is not None:
            self._cost_counter.captured.remove()
        self._cost_counter = self._recorder = self._last_step = self._masks = None
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

    def _record(self, trainer: Trainer, pl_module: LightningModule) -> Recorder:
        if self._recorder is None:  # lazy layers have shapes after the first forward pass
            self._recorder = self._start_recorder(pl_module)
        assert self._cost_counter is not None
        self._recorder.update(
            pl_module, self._cost_counter(pl_module), steps_done(trainer), self._layer_stats(pl_module)
        )
        self.state(pl_module).update(self._recorder.plain())
        self._parameters = tuple(pl_module.parameters())
        self._last_signature = self._signature(pl_module)
        return self._recorder

    def _layer_stats(self, pl_module: LightningModule) -> dict[str, dict[str, float]]:
        return layer_stats(self.compression_state(pl_module).state)

    def _is_due(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        step = steps_done(trainer)
        if self._last_step is None:
            return True
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
        on_time = every > 0 and step % every == 0 and step != self._last_step
        return on_time or self._last_signature != self._signature(pl_module)

    def _signature(self, pl_module: LightningModule) -> tuple[Any, ...]:
        """Return a cheap value that changes with the structure."""
        return len(self.compression_state(pl_module).edit_log), [parameter.shape for parameter in self._parameters]

    def _copy_masks(self, pl_module: LightningModule) -> dict[str, Tensor]:
        """Copy the masks of every method from the compression state."""
        masks_of_methods = [state.get("masks", {}) for state in self.compression_state(pl_module).state.values()]
        return {name: mask.clone() for masks in masks_of_methods for name, mask in masks.items()}

    def _churn(self, pl_module: LightningModule) -> dict[str, float]:
        """Return the fraction of mask entries that has changed since the last record; nothing without masks."""
        before, self._masks = self._masks or {}, self._copy_masks(pl_module)
        return {f"{PREFIX}/churn": mask_churn(before, self._masks)} if before or self._masks else {}

    # Private: where it is written.

    def _log_scalars(self, trainer: Trainer, recorder: Recorder, churn: Mapping[str, float]) -> None:
        """Log to every logger at Lightning's own steps, not through ``self.log`` and its intervals."""
        if not trainer.is_global_zero:
            return
        scalars = {**total_scalars(recorder.now, recorder.before), **churn}
        if self.per_layer:
            scalars |= layer_scalars(recorder.now, recorder.layers)
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=steps_done(trainer))

    def _log_metrics(self, pl_module: LightningModule, recorder: Recorder) -> None:
        """Log for other callbacks (``ModelCheckpoint(monitor="compression/macs_remaining")``) and the progress bar."""
        remaining = "params_remaining" if recorder.before.macs is None else "macs_remaining"
        shown = {f"{PREFIX}/sparsity", f"{PREFIX}/{remaining}"} if self.progress_bar else set()
        for name, value in total_scalars(recorder.now, recorder.before).items():
            pl_module.log(name, value, prog_bar=name in shown, logger=False, on_step=True, on_epoch=False, batch_size=1)

    def _draw(self, trainer: Trainer, pl_module: LightningModule, recorder: Recorder) -> None:
        for writer, _ in self._tensorboards(trainer):
            if self.histograms:
                add_histograms(writer, pl_module, recorder.layers, steps_done(trainer))
            if self.heat_map:
                add_heat_maps(writer, recorder.history, steps_done(trainer))

    def _report(self, trainer: Trainer, pl_module: LightningModule, recorder: Recorder) -> None:
        cost = None if self._cost_counter is None else self._cost_counter(pl_module)
        recorder.update(pl_module, cost, steps_done(trainer), self._layer_stats(pl_module))
        if self.deflate and trainer.is_global_zero:
            recorder.now = replace(recorder.now, deflated=deflated_bytes(pl_module))
        self._log_scalars(trainer, recorder, self._churn(pl_module))
        self._draw(trainer, pl_module, recorder)
        before, now, layers = recorder.before, recorder.now, recorder.layers
        self.before, self.after, self.history = before, now, recorder.history
        notes = _notes(trainer, now)
        for writer, _ in self._tensorboards(trainer):
            text = compression_markdown(before, now, layers=layers, notes=notes)
            writer.add_text(f"{PREFIX}/table", text, steps_done(trainer))
        if self.table and trainer.is_global_zero:
            _print(compression_table(before, now, layers=layers, notes=notes))

    def _tensorboards(self, trainer: Trainer) -> list[tuple[Any, str]]:
        """Return the writer and the folder of each TensorBoard logger, on rank 0 only."""
        loggers: list[Any] = trainer.loggers if trainer.is_global_zero else []
        return [(each.experiment, each.log_dir) for each in loggers if is_host(each, "loggers.TensorBoardLogger")]

    # Private: hyper-parameters. TensorBoard keeps only the first ones of a run, so all have to be logged at once.

    def _add_hparams(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the methods' arguments to the user's hyper-parameters until Lightning has logged them."""
        methods = method_hparams(callbacks_of(trainer))
        if not methods:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]  # set by a connector
        for owner in (pl_module, data):
            if logs_hparams(owner):
                if not methods.keys() <= owner.hparams_initial.keys():  # else another monitor has done it
                    self._hparams_patch = add_hparams(owner, methods)
                return
        for logger in trainer.loggers:
            logger.log_hyperparams(methods)

    def _remove_hparams(self) -> None:
        if self._hparams_patch is not None:
            self._hparams_patch.undo()
        self._hparams_patch = None


def _print(table: Table) -> None:
    console = Console()
    if not console.is_terminal:  # a file has no width
        wide = console.options.update_width(1000)
        console.width = max(console.width, Measurement.get(console, wide, table).maximum)
    console.print(table)


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
