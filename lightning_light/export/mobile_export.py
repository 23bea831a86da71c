"""`MobileExport`: export the trained network to a file for the device at the end of ``fit``."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypedDict

from typing_extensions import override

from lightning_light.callback import CompressionCallback
from lightning_light.capture import Capture
from lightning_light.errors import LightningLightError, UnsupportedError
from lightning_light.example_input import ExampleInput
from lightning_light.export.copies import detached_copy
from lightning_light.export.evaluation import Evaluator, MetricInputs
from lightning_light.export.exporter import Exporter
from lightning_light.export.functional import Batch, ExportOptions, export_verified
from lightning_light.export.parity import Tolerance
from lightning_light.export.recorder import Recorder
from lightning_light.export.report import ExportReport
from lightning_light.export.validation import ValidationEvaluator
from lightning_light.formatting import human_bytes
from lightning_light.host.classes import is_host
from lightning_light.host.trainer import callbacks_of
from lightning_light.int8 import quantizers_of
from lightning_light.measure.metrics import MetricLike, metrics_of
from lightning_light.order import Stage
from lightning_light.schema import PlainExample
from lightning_light.surgery.distributed import broadcast, log_rank_zero
from lightning_light.surgery.stored_example import restore_or_capture_example, store_example
from lightning_light.training_step import overrides
from lightning_light.validation import NonNegativeInt, PositiveInt, validated

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import nn

__all__ = ["MobileExport"]

_PARITY_BATCHES = 4


class _State(TypedDict, total=False):
    """What a checkpoint holds: one call of the network."""

    example: PlainExample


@validated
class MobileExport(CompressionCallback):
    """Export the trained network to a file when ``fit`` ends, and verify the file in its real runtime.

    A copy is exported; the live module is not changed. The outputs of the file are compared with the module's on
    batches of the last validation, as ``forward`` received them, its metrics are computed over the validation set, and
    it is timed on one sample. The report is written to ``{path}.json`` and kept as ``report``. If the outputs differ by
    more than ``parity``, the run ends with an error, and the module is saved in a checkpoint.

    A Trainer may have one callback per runtime; they export one after the other. When one fails, its error names the
    files that were written and those that were not. With several processes the first one exports, and all fail if it
    fails. With ``fast_dev_run`` everything happens in a temporary folder.

    Example:
        >>> import os, tempfile
        >>> import lightning as L
        >>> folder = tempfile.mkdtemp()
        >>> export = MobileExport(f"{folder}/model.ptl", latency_runs=5)
        >>> trainer = L.Trainer(
        ...     max_steps=2, callbacks=[export], logger=False, enable_checkpointing=False, accelerator="cpu",
        ...     enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> trainer.fit(module, data, data)
        >>> sorted(os.listdir(folder)), export.report.parity.max_absolute < 1e-4
        (['model.ptl', 'model.ptl.json'], True)

    Args:
        path: of the file; its suffix ``.ptl``, ``.pte``, ``.onnx`` or ``.pt2`` chooses the exporter.
        exporter: file format and runtime, if not the default for the suffix.
        parity: maximum difference of an output of the file to the module's.
        checkpoint: which weights: ``last``, or the ``best`` of the first ``ModelCheckpoint``.
        batch: ``any``: exported from one sample and verified with other batch sizes; ``one``: verified with one sample
            at a time; ``as_given``: the inputs have no batch dimension, or keep exactly their shapes.
        metrics: a metric or collection of torchmetrics, computed for the file and for the module over the validation
            set; by default those that the module holds as attributes and updates in ``validation_step``.
        metric_inputs: (outputs of the module, batch) -> arguments of the given metrics' ``update``; by default the
            outputs and the batch's labels.
        metric_batches: validation batches for the metrics, at most; None for all, 0 for no metrics.
        latency_runs: timed calls of the file, after a warm-up.
        latency_threads: threads of the runtime in them.
        merge_branches: export blocks of parallel branches merged: those of `Reparameterization`, and blocks with a
            method ``fuse``, ``reparameterize`` or ``switch_to_deploy``. Not in a quantized network.
        module: name of the submodule that is exported, for instance ``"net"`` where the steps call ``self.net(x)`` and
            ``forward`` is not implemented; None for the module itself. Not of a quantized network.
        inputs: names of the file's inputs, see `ExportOptions`; None: all that the outputs are computed from.

    Raises:
        ValueError: an argument is wrong, two exports have one path, or there is no ``ModelCheckpoint`` for ``best``.
        UnsupportedError: the format is not installed, the strategy shards the network, or ``forward`` is not
            implemented.
        LightningLightError: after the first batch: the input of ``forward`` is not known.
        TraceError: at the end of ``fit``: the format cannot express the network.
        ParityError: at the end of ``fit``: the outputs of the file differ.

    Note:
        The inputs of ``forward`` are recorded in the run: an example in ``example_input_array`` or the first training
        batch, real ones in validation. Where the training step does not call ``self(...)``, the example is what a part
        of the module gets, if ``forward`` runs on it. Where the validation step does not, the file is compared on the
        example alone, and has no metrics.
    """

    method: ClassVar[str] = "mobile_export"
    stage: ClassVar[int] = Stage.EXPORT
    structural: ClassVar[bool] = False
    whole_parameters: ClassVar[tuple[str, str] | None] = (
        "one process exports the whole network",
        "Save a full checkpoint, load it in one process, and call `export_model` on it.",
    )
    state_schema: ClassVar[Any] = _State

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        exporter: Exporter | None = ExportOptions.exporter,
        parity: Tolerance = ExportOptions.parity,
        checkpoint: Literal["last", "best"] = "last",
        batch: Batch = ExportOptions.batch,
        metrics: MetricLike | None = None,
        metric_inputs: MetricInputs | None = None,
        metric_batches: NonNegativeInt | None = None,
        latency_runs: PositiveInt = ExportOptions.latency_runs,
        latency_threads: PositiveInt = ExportOptions.latency_threads,
        merge_branches: bool = ExportOptions.merge_branches,
        module: str | None = None,
        inputs: Sequence[str] | None = ExportOptions.inputs,
    ) -> None:
        self._options = ExportOptions(exporter, parity, batch, latency_runs, latency_threads, merge_branches, inputs)
        self._exporter = self._options.for_path(path)
        self.path = path
        self.exporter = exporter
        self.parity = parity
        self.checkpoint = checkpoint
        self.batch = batch
        self.metrics = metrics
        self.metric_inputs = metric_inputs
        self.metric_batches = metric_batches
        self.latency_runs = latency_runs
        self.latency_threads = latency_threads
        self.merge_branches = merge_branches
        self.module = module
        self.inputs = inputs
        self.report: ExportReport | None = None
        self._capture = Capture()
        self._recorder = Recorder(limit=_PARITY_BATCHES)

    # Lightning's hooks, in the order a run meets them.

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before anything is trained, what cannot be exported after it."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._refuse_shared_path(trainer)
        self._exporter.check()
        self._check_module(pl_module)
        self._check_int8(trainer, pl_module)
        if self.checkpoint == "best" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            _best_of(trainer)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to capture an example of the inputs of ``forward``."""
        super().on_fit_start(trainer, pl_module)
        self.report, self._recorder = None, Recorder(limit=_PARITY_BATCHES)
        if trainer.is_global_zero:
            state = self.state(pl_module)
            if not self.resumed(pl_module):
                state.clear()
            self._capture = restore_or_capture_example(pl_module, state, self._exported(pl_module))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Refuse, after the first batch, a network whose input is not known; store the example in checkpoints.

        A run may be interrupted between its last step and the export.
        """
        found = self._capture.example
        if self._capture.observed is not None and (found is None or found.method != "forward"):
            raise self._unknown_input(pl_module)
        store_example(self.state(pl_module), self._capture)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the first inputs of each validation; those of the last one are compared."""
        if trainer.is_global_zero and trainer.state.fn == "fit":
            self._recorder.start(self._exported(pl_module))

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the recording while training goes on."""
        self._recorder.stop()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export, after averaged weights are in place and the last checkpoint is written."""
        self._remove_hooks()
        try:
            if trainer.is_global_zero:
                self.report = self._export(trainer, pl_module)
                latency = f"{self.report.latency.median * 1e3:.3g} ms per sample"
                written = f"{Path(self.path).name}, {human_bytes(self.report.bytes)}, {latency}"
                log_rank_zero(trainer, f"mobile export: {written}")
                log_rank_zero(trainer, f"{self.method}: {self.report.summary()}", level=logging.DEBUG)
        finally:
            self._conclude(trainer, sys.exc_info()[1])

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks and free the recorded batches."""
        super().teardown(trainer, pl_module, stage)
        self._remove_hooks()
        self._capture, self._recorder = Capture(), Recorder(limit=_PARITY_BATCHES)

    @override
    def rehearse(self, model: nn.Module, example: ExampleInput, batches: Sequence[Any]) -> list[str]:
        """Write the file to a temporary folder, and compare it on the example."""
        name, options = Path(self.path).name, dataclasses.replace(self._options, latency_runs=1)
        with tempfile.TemporaryDirectory() as folder:
            part = model.get_submodule(self.module or "")
            report = export_verified(part, example, Path(folder) / name, options, (), lambda _: None)
        error = f"largest difference {report.parity.max_absolute:.1e}"
        return [f"{name}: {human_bytes(report.bytes)} for {report.runtime}, {error}"]

    # Private: checks in `setup`.

    def _refuse_shared_path(self, trainer: Trainer) -> None:
        paths = [Path(one.path).absolute() for one in callbacks_of(trainer) if isinstance(one, MobileExport)]
        if paths.count(Path(self.path).absolute()) > 1:
            raise ValueError(
                f"`MobileExport({str(self.path)!r})`: expected a path for each export of the Trainer, found it "
                "twice: the second file would take the place of the first. Give them two names."
            )

    def _others(self, trainer: Trainer) -> str:
        """Name the files of the Trainer's other exports: written before this one failed, or not written."""
        exports = [one for one in callbacks_of(trainer) if isinstance(one, MobileExport)]
        place = exports.index(self)
        parts = (("Written before", exports[:place]), ("Not exported after it", exports[place + 1 :]))
        return "".join(f" {what}: {', '.join(repr(str(one.path)) for one in some)}." for what, some in parts if some)

    def _check_int8(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = [one.int8_weights() for one in callbacks_of(trainer) if isinstance(one, CompressionCallback)]
        weights = next((one for one in found if one is not None), None)
        if self.module is not None and (weights is not None or quantizers_of(pl_module)):
            raise UnsupportedError(
                f"`MobileExport(module={self.module!r})` with quantization: expected the quantized module, found "
                f"a part of it. Implement `forward` in `{type(pl_module).__name__}`, and leave `module` out."
            )
        if weights is not None or not quantizers_of(pl_module):  # within `fake_quantized` nothing is known of them yet
            self._exporter.check_int8(weights)

    def _remove_hooks(self) -> None:
        self._capture.remove()
        self._recorder.stop()

    def _export(self, trainer: Trainer, pl_module: LightningModule) -> ExportReport:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            with tempfile.TemporaryDirectory() as folder:
                return self._write(trainer, pl_module, Path(folder) / Path(self.path).name)
        module = _restored(trainer, pl_module) if self.checkpoint == "best" else pl_module
        return self._write(trainer, module, self.path)

    def _write(self, trainer: Trainer, module: LightningModule, path: str | os.PathLike[str]) -> ExportReport:
        example, calls = self._example(trainer, module), self._recorder.calls

        def evaluator(details: dict[str, Any]) -> Evaluator | None:
            is_int8 = "output_scales" in details
            wanted = is_int8 or self.metrics is not None or bool(metrics_of(module))
            if self.metric_batches == 0 or not wanted or not (calls or self.metrics):
                return None
            return ValidationEvaluator(
                trainer, module, self.metrics, self.metric_inputs, self.metric_batches, self.module or ""
            )

        return export_verified(self._exported(module), example, path, self._options, calls, evaluator)

    def _example(self, trainer: Trainer, module: LightningModule) -> ExampleInput:
        if (found := self._capture.example) is not None:
            # A batch has been converted before `forward` saw it, an `example_input_array` is as the user wrote it.
            return ExampleInput(*trainer.precision_plugin.convert_input((found.args, found.kwargs)))
        if self._recorder.calls:
            return self._recorder.calls[0]
        raise self._unknown_input(module)

    def _unknown_input(self, module: LightningModule) -> LightningLightError:
        what = f"{type(module).__name__}.{self.module or 'forward'}"
        return LightningLightError(
            f"`MobileExport({str(self.path)!r})` on `{type(module).__name__}`: expected an example of the inputs of "
            f"`{what}`, found no `example_input_array`, no call in `training_step`, and that it does not run on what "
            "the parts of the module get there. Set `self.example_input_array = ...` in the module, or export the part "
            "that the step calls, for instance `module='net'`."
        )

    def _exported(self, module: LightningModule) -> nn.Module:
        return module.get_submodule(self.module or "")

    def _check_module(self, pl_module: LightningModule) -> None:
        """Refuse a part that is not there, and a module without ``forward``."""
        names = [name for name, _ in pl_module.named_modules() if name]
        if self.module is not None and self.module not in names:
            near = difflib.get_close_matches(self.module, names, n=3, cutoff=0.0)
            raise ValueError(
                f"`MobileExport(module={self.module!r})`: expected the name of a submodule of "
                f"`{type(pl_module).__name__}`, found none. The nearest are {near}."
            )
        if self.module is None and not overrides(pl_module, "forward"):
            parts = [name for name, part in pl_module.named_children() if any(True for _ in part.parameters())]
            raise UnsupportedError(
                f"`MobileExport({str(self.path)!r})` on `{type(pl_module).__name__}`: expected a `forward` to export, "
                f"found none. Implement `forward`, or export a part of the module by `module=...`: it has {parts}."
            )

    def _conclude(self, trainer: Trainer, error: BaseException | None) -> None:
        """Broadcast the outcome; after an error save the trained network, then fail on every process."""
        found = None if error is None else f"{type(error).__name__}: {error}"
        failure = broadcast(trainer, found)
        if failure is None or not isinstance(error, Exception | None):
            return
        saved = ""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            saved = f" {_rescued(trainer, f'{self.path}.ckpt')}{self._others(trainer)}"
        if isinstance(error, LightningLightError):
            raise type(error)(f"{error}{saved}") from error
        raise LightningLightError(
            f"`MobileExport({str(self.path)!r})` failed after training: {failure}{saved}"
        ) from error


def _rescued(trainer: Trainer, path: str) -> str:
    """Save the trained network, and describe where it is; a full disk may be what the export failed of."""
    try:
        trainer.save_checkpoint(path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            Path(path).unlink()  # a part of one
        return f"The trained network could not be saved in {path!r} ({error}): it is in the module that was fitted."
    return f"The trained network is saved in {path!r}."


def _best_of(trainer: Trainer) -> Any:
    callbacks = callbacks_of(trainer)
    found = next((callback for callback in callbacks if is_host(callback, "ModelCheckpoint")), None)
    if found is None:
        raise ValueError(
            "`MobileExport(checkpoint='best')`: expected a `ModelCheckpoint` among the Trainer's callbacks, found "
            "none. Add one with `monitor=...`, or export the last weights: `checkpoint='last'`."
        )
    return found


def _restored(trainer: Trainer, pl_module: LightningModule) -> LightningModule:
    """Copy the module and load the best checkpoint's structure and weights into the copy, as the Trainer does."""
    path = _best_of(trainer).best_model_path
    if not path:
        raise LightningLightError(
            "`MobileExport(checkpoint='best')`: expected a checkpoint by the end of training, found that "
            "`ModelCheckpoint` has saved none. Let it save at least once, or use `checkpoint='last'`."
        )
    saved = trainer.strategy.checkpoint_io.load_checkpoint(path, map_location="cpu", weights_only=False)
    copy = detached_copy(pl_module)
    copy.on_load_checkpoint(saved)
    copy.load_state_dict(saved["state_dict"], strict=copy.strict_loading)
    return copy
