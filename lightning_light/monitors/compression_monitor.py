"""`CompressionMonitor`: watches a network shrink, changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from rich.console import Console
from rich.measure import Measurement
from typing_extensions import override

from lightning_light.callback import CompressionCallback
from lightning_light.errors import UnsupportedError
from lightning_light.example_input import capture
from lightning_light.host.classes import is_host
from lightning_light.measure.layer_stats import layer_stats
from lightning_light.measure.size import deflated_bytes
from lightning_light.measure.sparsity import mask_churn
from lightning_light.monitors.dashboard import add_heat_maps, add_histograms, add_layout
from lightning_light.monitors.hparams import method_hparams
from lightning_light.monitors.recorder import CostCounter, Recorder, is_countable
from lightning_light.monitors.scalars import PREFIX, custom_layout, layer_scalars, total_scalars
from lightning_light.monitors.table import compression_markdown, compression_table, human_bytes, human_count
from lightning_light.order import Stage
from lightning_light.progress import steps_done
from lightning_light.targets import Targets, as_targets

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from rich.table import Table
    from torch import Tensor, nn

    from lightning_light.monitors.history import History
    from lightning_light.monitors.snapshot import Snapshot

__all__ = ["CompressionMonitor"]


class CompressionMonitor(CompressionCallback):
    """Log what a network costs while it is compressed, and print what has become of every layer at the end.

    Every logger gets the totals (``compression/params``, ``macs``, ``bytes``, ``sparsity``, ``bits``), what remains of
    them (``compression/macs_remaining``, ...), what zeros are worth (``effective_macs``, ``dead_filters``, ``churn`` of
    masks), and the same for every layer (``compression/channels/<layer>``, ...), on Lightning's own axis; and what
    methods know of a layer: its rank, the energy kept, the bits it takes in a coded file.
    TensorBoard gets more: histograms of weights, a heat map of layers over time, a layout of its Custom Scalars page,
    and the table. The totals are also in ``trainer.callback_metrics``.

    "Before" is the network as the first fit found it; it is in every checkpoint, so a resumed run compares with the
    same. The run itself is the same to the last bit with and without the monitor. MACs are those of one sample.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> monitor = CompressionMonitor(layers=["net.conv*", "net.fc"], table=False)
        >>> trainer = Trainer(callbacks=[monitor], fast_dev_run=True, accelerator="cpu", enable_progress_bar=False,
        ...                   enable_model_summary=False)
        >>> trainer.fit(module, data, data)
        >>> trainer.callback_metrics["compression/macs_remaining"]
        tensor(1.)

    Args:
        every_n_steps: optimizer steps between two looks; None: the Trainer's ``log_every_n_steps``. A change of
            structure is always looked at.
        layers: which layers have curves, histograms and a line of their own: names or patterns as in `Targets`; None:
            all that have a weight of two or more dimensions. Lines and curves of a layer that is replaced are those of
            its replacement.
        per_layer: log curves of each layer, not only of the whole network.
        histograms: log the distribution of each layer's weights, once an epoch, to TensorBoard.
        heat_map: log a picture of layers over time, once an epoch, to TensorBoard.
        layout: add a ``compression`` section to TensorBoard's Custom Scalars, beside the user's.
        hparams: add the arguments of every compression method to the hyper-parameters that the loggers get.
        deflate: at the end, measure what the stored tensors weigh after lossless compression.
        progress_bar: show the remaining MACs and the sparsity in the progress bar.
        table: print the table, before → after, at the end of fit.

    Attributes:
        before: after a fit, the network as the first fit found it.
        after: after a fit, the network as it is.
        history: after a fit, what remained of each layer from moment to moment.

    Raises:
        ValueError: ``every_n_steps`` is below 1.
        TargetError: ``layers`` names no layer of the model.
        UnsupportedError: the strategy shards the parameters.
    """

    method: ClassVar[str] = "compression_monitor"
    stage: ClassVar[int] = Stage.MONITORS
    structural: ClassVar[bool] = False

    _count: CostCounter | None = None
    _chronicle: Recorder | None = None
    _last_step: int | None = None  # at which we looked
    _masks: Mapping[str, Tensor] | None = None  # copies, as they were at the last look
    _parameters: tuple[nn.Parameter, ...] = ()
    _seen: tuple[Any, ...] = ()
    _borrowed: tuple[Any, Any] | None = None  # whose hyper-parameters, and what they were

    def __init__(
        self,
        *,
        every_n_steps: int | None = None,
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
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"`CompressionMonitor(every_n_steps={every_n_steps})`: expected an integer >= 1, or None.")
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
        """Refuse a strategy under which a process sees only its share of the parameters."""
        super().setup(trainer, pl_module, stage)
        strategy = trainer.strategy
        if strategy.restore_checkpoint_after_setup or not strategy.lightning_restore_optimizer:
            raise UnsupportedError(
                f"`CompressionMonitor` with `{type(strategy).__name__}`: expected a strategy that leaves parameters "
                "whole (one device, or 'ddp'), found one that shards or owns them, so that no process can count them. "
                "Leave the monitor out, or use `strategy='ddp'`."
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the network before anything is done to it, and add our hyper-parameters to the user's."""
        super().on_fit_start(trainer, pl_module)
        self._forget()
        self.before = self.after = self.history = None
        self._count = CostCounter(capture(pl_module))
        if is_countable(pl_module):
            self._chronicle = self._begin(pl_module)
        if self.hparams and trainer.is_global_zero:
            self._lend_hparams(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the user's hyper-parameters back: Lightning has logged them by now."""
        self._return_hparams()
        self._last_step = None
        self._masks = self._copy_masks(pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look, if a look is due or the structure has changed: every method has acted by now."""
        if not self._is_due(trainer, pl_module):
            return
        recorder = self._look(trainer, pl_module)
        self._log_scalars(trainer, recorder, self._churn(pl_module))
        self._log_metrics(pl_module, recorder)
        if self.layout and self._last_step is None:
            for writer, folder in self._tensorboards(trainer):
                add_layout(writer, folder, custom_layout(per_layer=self.per_layer))
        self._last_step = steps_done(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        if self._chronicle is not None:
            self._draw(trainer, pl_module, self._chronicle)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look once more, for what a checkpoint saved after the run remembers."""
        if self._chronicle is not None:
            self._look(trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Show the result: here, because other callbacks have exported and converted in ``on_fit_end``."""
        super().teardown(trainer, pl_module, stage)
        self._return_hparams()
        if stage == "fit" and self._chronicle is not None:
            self._conclude(trainer, pl_module, self._chronicle)
        self._forget()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the module: there will be no teardown."""
        self._return_hparams()
        self._forget()

    # Private: when to look, and at what.

    def _forget(self) -> None:
        if self._count is not None:
            self._count.captured.remove()
        self._count = self._chronicle = self._last_step = self._borrowed = self._masks = None
        self._parameters, self._seen = (), ()

    def _begin(self, pl_module: LightningModule) -> Recorder:
        """Take up what a checkpoint remembers, or begin."""
        layers = None if self.layers is None else list(as_targets(self.layers).select(pl_module))
        assert self._count is not None
        cost, state = self._count(pl_module), self.state(pl_module)
        if "before" in state:
            return Recorder.from_plain(state, pl_module, cost)
        recorder = Recorder(pl_module, cost, layers=layers)
        state.update(recorder.plain())
        return recorder

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> Recorder:
        if self._chronicle is None:  # the first forward pass has given lazy layers their shapes
            self._chronicle = self._begin(pl_module)
        assert self._count is not None
        self._chronicle.look(pl_module, self._count(pl_module), steps_done(trainer), self._facts(pl_module))
        self.state(pl_module).update(self._chronicle.plain())
        self._parameters = tuple(pl_module.parameters())
        self._seen = self._signature(pl_module)
        return self._chronicle

    def _facts(self, pl_module: LightningModule) -> dict[str, dict[str, float]]:
        return layer_stats(self.compression_state(pl_module).state)

    def _is_due(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        step = steps_done(trainer)
        if self._last_step is None:
            return True
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
        on_time = every > 0 and step % every == 0 and step != self._last_step
        return on_time or self._seen != self._signature(pl_module)

    def _signature(self, pl_module: LightningModule) -> tuple[Any, ...]:
        """Return a cheap value that changes with the structure."""
        return len(self.compression_state(pl_module).edit_log), [parameter.shape for parameter in self._parameters]

    def _copy_masks(self, pl_module: LightningModule) -> dict[str, Tensor]:
        """Of every method that has some: they are in the compression_state."""
        held = [state.get("masks", {}) for state in self.compression_state(pl_module).state.values()]
        return {name: mask.clone() for masks in held for name, mask in masks.items()}

    def _churn(self, pl_module: LightningModule) -> dict[str, float]:
        """What share of all masks has changed since the last look; nothing where there are none."""
        before, self._masks = self._masks or {}, self._copy_masks(pl_module)
        return {f"{PREFIX}/churn": mask_churn(before, self._masks)} if before or self._masks else {}

    # Private: where it goes.

    def _log_scalars(self, trainer: Trainer, recorder: Recorder, churn: Mapping[str, float]) -> None:
        """To every logger, on the axis that Lightning itself uses, so not through ``self.log`` and its intervals."""
        if not trainer.is_global_zero:
            return
        scalars = {**total_scalars(recorder.now, recorder.before), **churn}
        if self.per_layer:
            scalars |= layer_scalars(recorder.now, recorder.layers)
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=steps_done(trainer))

    def _log_metrics(self, pl_module: LightningModule, recorder: Recorder) -> None:
        """To other callbacks (``ModelCheckpoint(monitor="compression/macs_remaining")``) and the progress bar."""
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

    def _conclude(self, trainer: Trainer, pl_module: LightningModule, recorder: Recorder) -> None:
        cost = None if self._count is None else self._count(pl_module)
        recorder.look(pl_module, cost, steps_done(trainer), self._facts(pl_module))
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
        """The writer and the folder of each TensorBoard logger; on one process only."""
        loggers: list[Any] = trainer.loggers if trainer.is_global_zero else []
        return [(each.experiment, each.log_dir) for each in loggers if is_host(each, "loggers.TensorBoardLogger")]

    # Private: hyper-parameters. TensorBoard keeps the first record of a run, so there must be one for user and methods.

    def _lend_hparams(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put ours beside the user's until Lightning has logged them; what a checkpoint stores is another copy."""
        methods = method_hparams(trainer.callbacks)  # type: ignore[attr-defined]  # set by a connector
        if not methods:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]  # set by a connector
        for owner in (pl_module, data):
            if owner is not None and owner._log_hyperparams:
                if not methods.keys() <= owner.hparams_initial.keys():  # else another monitor has done it
                    self._borrowed = owner, owner._hparams_initial
                    owner._hparams_initial = {**owner.hparams_initial, **methods}
                return
        for logger in trainer.loggers:
            logger.log_hyperparams(methods)

    def _return_hparams(self) -> None:
        if self._borrowed is not None:
            owner, hparams = self._borrowed
            owner._hparams_initial = hparams
            self._borrowed = None


def _print(table: Table) -> None:
    console = Console()
    if not console.is_terminal:  # a file has no width
        wide = console.options.update_width(1000)
        console.width = max(console.width, Measurement.get(console, wide, table).maximum)
    console.print(table)


def _notes(trainer: Trainer, now: Snapshot) -> list[str]:
    """Lines below the table: what zeros spare, what was exported, as the callback that did it says, what is unknown."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    reports: list[Any] = [getattr(callback, "report", None) for callback in callbacks]
    notes = [f"exported: {report.summary()}" for report in reports if callable(getattr(report, "summary", None))]
    if now.zeros and now.effective_macs is not None:
        notes.append(f"MACs whose weight is not zero: {human_count(now.effective_macs)}")
    if now.deflated is not None:
        notes.append(f"size after compression (DEFLATE): {human_bytes(now.deflated)}")
    if now.macs is None:
        notes.append("MACs are not known: `forward` was not called. Set the module's `example_input_array`.")
    return notes
