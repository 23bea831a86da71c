"""Write a report of the run when ``fit`` ends: one HTML file, and the same in JSON."""

from __future__ import annotations

import os
import tempfile
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from lightning_light.callback import CompressionCallback
from lightning_light.host.trainer import callbacks_of
from lightning_light.monitors.recording import RecordingCallback
from lightning_light.progress import steps_done
from lightning_light.report import describe_environment, write_report
from lightning_light.report.contents import Curve, RunReport, curves_of, export_reports
from lightning_light.report.figures import check_matplotlib
from lightning_light.surgery.distributed import log_rank_zero
from lightning_light.validation import validated

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["CompressionReport"]


@validated
@dataclass(eq=False, repr=False)
class CompressionReport(RecordingCallback):
    """Write a report of the whole run at the end of ``fit``: one self-contained HTML file, and a JSON beside it.

    It has the network before and after (validation metrics, MACs, parameters, bit operations, stored size, the files of
    each `MobileExport` with size, latency and parity, peak memory), plots over the run, a table of every layer, the
    events of all methods in words, and what it takes to reproduce the run: versions, machine, seed, command.

    "Before" is the network at the start of the first fit; metrics before are those of the last validation before the
    first event. What was recorded is in every checkpoint, so a resumed run reports the whole, and
    `report_from_checkpoint` makes the tables again from a checkpoint alone.

    Needs matplotlib: ``pip install lightning-light[report]``. With ``fast_dev_run`` the files are written to a
    temporary folder and removed.

    Example:
        >>> import os, tempfile
        >>> import lightning as L
        >>> folder = tempfile.mkdtemp()
        >>> trainer = L.Trainer(
        ...     max_steps=2, callbacks=[CompressionReport(f"{folder}/report.html")], logger=False, accelerator="cpu",
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> trainer.fit(module, data, data)
        >>> sorted(os.listdir(folder))
        ['report.html', 'report.json']

    Args:
        path: of the HTML file; the JSON has the same name with the suffix ``.json``.
        baseline: the JSON of another report, for instance of the dense network: its metrics and exported files are
            shown as those before.

    Attributes:
        result: after a fit, the contents as a `lightning_light.report.RunReport`; a notebook shows its tables.

    Raises:
        ValueError: ``path`` does not end in ``.html``.
        FileNotFoundError: there is no ``baseline``.
        UnsupportedError: matplotlib is not installed, or the strategy shards the parameters.
    """

    method: ClassVar[str] = "compression_report"

    path: str | os.PathLike[str] = "report.html"
    _: KW_ONLY
    baseline: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        super().__init__()
        path = Path(self.path)
        if path.suffix != ".html":
            raise ValueError(
                f"`CompressionReport({os.fspath(self.path)!r})`: expected a path that ends in '.html', found "
                f"{path.suffix or 'no suffix'!r}. Write for instance `CompressionReport('report.html')`."
            )
        self.result: RunReport | None = None
        self._metrics: dict[str, Curve] = {}

    # Lightning's hooks, in the order a run meets them.

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before anything is trained, a report that cannot be drawn."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._metrics = {}  # those of a checkpoint are restored between here and `on_fit_start`
            check_matplotlib(repr(self))
            if self.baseline is not None:
                RunReport.read(self.baseline)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the network before it is compressed."""
        super().on_fit_start(trainer, pl_module)
        self.result = None

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics that the validation has logged."""
        super().on_validation_end(trainer, pl_module)
        if self._validation is not None and not trainer.sanity_checking:
            for name, value in self._validation.values.items():
                self._metrics.setdefault(name, []).append((steps_done(trainer), value))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the network if a method has changed it; every method has acted by now."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.has_changed(pl_module):
            self.record(trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the report, after other callbacks have exported and converted in ``on_fit_end``."""
        super().teardown(trainer, pl_module, stage)
        if stage == "fit" and self.conclude(trainer, pl_module) is not None and trainer.is_global_zero:
            self.result = self._contents(trainer, pl_module)
            self._write(trainer, self.result)
        self._reset()

    # The metrics are no part of the compression state: Lightning leaves out a validation when a run is resumed from the
    # last step before it, so that they depend on the checkpoints. All else is there, also in weights-only checkpoints.

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the metrics of the validations so far."""
        return {"metrics": {name: [list(point) for point in curve] for name, curve in self._metrics.items()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the metrics of the validations so far."""
        self._metrics = curves_of(state_dict["metrics"])

    # Private.

    def _contents(self, trainer: Trainer, pl_module: LightningModule) -> RunReport:
        assert self.before is not None
        assert self.after is not None  # `conclude`
        callbacks = callbacks_of(trainer)
        return RunReport(
            before=self.before,
            after=self.after,
            history=self.history,
            metrics=self._metrics,
            events=tuple(self.events(pl_module)),
            exports=tuple(export_reports(callbacks)),
            methods=tuple(repr(callback) for callback in callbacks if isinstance(callback, CompressionCallback)),
            environment=describe_environment(),
            baseline=None if self.baseline is None else RunReport.read(self.baseline).plain(),
        )

    def _write(self, trainer: Trainer, result: RunReport) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            with tempfile.TemporaryDirectory() as folder:
                write_report(result, Path(folder) / Path(self.path).name)
            return
        write_report(result, self.path)
        log_rank_zero(trainer, f"compression report: {Path(self.path)} and {Path(self.path).with_suffix('.json').name}")
