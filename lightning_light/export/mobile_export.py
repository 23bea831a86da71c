"""The trained network as a file for the device, when the fit ends."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from typing_extensions import override

from lightning_light.callback import CompressionCallback
from lightning_light.errors import LightningLightError, UnsupportedError
from lightning_light.example_input import Capture, ExampleInput, capture
from lightning_light.export.copies import detached_copy
from lightning_light.export.exporter import Exporter
from lightning_light.export.functional import (
    BATCH,
    EXPORTER,
    LATENCY_RUNS,
    LATENCY_THREADS,
    PARITY,
    Batch,
    check_options,
    export_model,
)
from lightning_light.export.parity import Tolerance
from lightning_light.export.recorder import Recorder
from lightning_light.export.replay import replayed
from lightning_light.export.report import ExportReport
from lightning_light.export.top1 import Labelled
from lightning_light.host.classes import is_host
from lightning_light.int8 import quantizers_of
from lightning_light.order import Stage
from lightning_light.surgery.distributed import broadcast, log_rank_zero

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor

__all__ = ["MobileExport"]

_BATCHES = 4


class MobileExport(CompressionCallback):
    """Write the trained network to a file, run the file in its real runtime, and compare, when ``fit`` ends.

    A copy is exported: the live module stays as it is. The file is compared on batches of the last validation, as
    ``forward`` received them, timed on one sample, and described by a report, in ``{path}.json`` and as ``report``.
    If it does not answer as the module does, the run ends with an error, and the module is in a checkpoint.

    One for each runtime: a Trainer may have several, which write one after the other; when one fails, its error names
    the files that are there and those that have not been tried.

    With several processes the first one exports, and all fail if it fails. With ``fast_dev_run`` all of this is done
    in a temporary folder.

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
        path: where the file goes; ends in the exporter's suffix.
        exporter: file format and runtime.
        parity: how far an answer of the file may be off.
        checkpoint: which weights: the ``last``, or the ``best`` of the first ``ModelCheckpoint``.
        batch: ``any``: exported from one sample, and held to run with other batch sizes; ``one``: to run with one
            sample at a time; ``as_given``: the inputs have no batch dimension, or shall keep exactly their shapes.
        top1: of an int8 file: ask it for the classes of the whole validation set, and the module too, on this
            machine's CPU. Where batches are pairs of inputs and labels, accuracies are reported besides.
        latency_runs: calls of the file that are timed, after a warm-up.
        latency_threads: of the runtime in them.

    Raises:
        ValueError: an argument is wrong, two exports have one path, or there is no ``ModelCheckpoint`` to take the
            best from.
        UnsupportedError: the format is not installed, or the strategy shards the network.
        TraceError: at the end of ``fit``: the format cannot express the network.
        ParityError: at the end of ``fit``: the file answers differently.

    Note:
        The input of ``forward`` is seen in the run: an example in the module's ``example_input_array`` or the first
        training batch, real ones in validation. A module whose steps do not call ``self(...)`` needs an
        ``example_input_array``, and is compared on that alone.
    """

    method: ClassVar[str] = "mobile_export"
    stage: ClassVar[int] = Stage.EXPORT
    structural: ClassVar[bool] = False

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        exporter: Exporter = EXPORTER,
        parity: Tolerance = PARITY,
        checkpoint: Literal["last", "best"] = "last",
        batch: Batch = BATCH,
        top1: bool = True,
        latency_runs: int = LATENCY_RUNS,
        latency_threads: int = LATENCY_THREADS,
    ) -> None:
        check_options(path, exporter, batch, latency_runs, latency_threads)
        if checkpoint not in ("last", "best"):
            raise ValueError(f"`MobileExport(checkpoint={checkpoint!r})`: expected 'last' or 'best'.")
        self.path = path
        self.exporter = exporter
        self.parity = parity
        self.checkpoint = checkpoint
        self.batch = batch
        self.top1 = top1
        self.latency_runs = latency_runs
        self.latency_threads = latency_threads
        self.report: ExportReport | None = None
        self._capture = Capture()
        self._recorder = Recorder(limit=_BATCHES)
        self._told: dict[int, Tensor] = {}  # number of a validation batch -> the module's classes

    # Lightning's hooks, in the order a run meets them.

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before anything is trained, what cannot be exported after it."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._refuse_shared_path(trainer)
        self.exporter.check()
        self._check_int8(trainer, pl_module)
        strategy = trainer.strategy
        if strategy.restore_checkpoint_after_setup or not strategy.lightning_restore_optimizer:
            raise UnsupportedError(
                f"`MobileExport` with `{type(strategy).__name__}`: expected a strategy that leaves parameters whole "
                "(one device, or 'ddp'), found one that shards or owns them. Save a full checkpoint, load it in one "
                "process, and call `export_model` on it."
            )
        if self.checkpoint == "best" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            _best_of(trainer)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look out for an example of what ``forward`` is called with."""
        super().on_fit_start(trainer, pl_module)
        self.report, self._recorder, self._told = None, Recorder(limit=_BATCHES), {}
        if trainer.is_global_zero:
            self._capture = capture(pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the first inputs of the validation: the last one's are compared on."""
        if trainer.is_global_zero and trainer.state.fn == "fit":
            self._recorder.watch(pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look away while training goes on."""
        self._recorder.stop()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export: by now averaged weights are in place and the last checkpoint is written."""
        self._let_go()
        try:
            if trainer.is_global_zero:
                self.report = self._export(trainer, pl_module)
                log_rank_zero(trainer, f"{self.method}: {self.report.summary()}")
        finally:
            self._conclude(trainer, sys.exc_info()[1])

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind, whatever happened."""
        self._let_go()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the batches."""
        super().teardown(trainer, pl_module, stage)
        self._let_go()
        self._capture, self._recorder, self._told = Capture(), Recorder(limit=_BATCHES), {}

    # Private: the small questions the hooks ask.

    def _refuse_shared_path(self, trainer: Trainer) -> None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # an attribute set by a connector
        paths = [Path(one.path).absolute() for one in callbacks if isinstance(one, MobileExport)]
        if paths.count(Path(self.path).absolute()) > 1:
            raise ValueError(
                f"`MobileExport({str(self.path)!r})`: expected a path for each export of the Trainer, found it "
                "twice: the second file would take the place of the first. Give them two names."
            )

    def _others(self, trainer: Trainer) -> str:
        """What has become of the Trainer's other exports when this one has failed."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # an attribute set by a connector
        exports = [one for one in callbacks if isinstance(one, MobileExport)]
        place = exports.index(self)
        parts = (("Written before", exports[:place]), ("Not tried after it", exports[place + 1 :]))
        return "".join(f" {what}: {', '.join(repr(str(one.path)) for one in some)}." for what, some in parts if some)

    def _check_int8(self, trainer: Trainer, pl_module: LightningModule) -> None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # an attribute set by a connector
        told = [one.int8_weights() for one in callbacks if isinstance(one, CompressionCallback)]
        weights = next((found for found in told if found is not None), None)
        if weights is not None or not quantizers_of(pl_module):  # within `fake_quantized` nothing is known of them yet
            self.exporter.check_int8(weights)

    def _let_go(self) -> None:
        self._capture.remove()
        self._recorder.stop()

    def _export(self, trainer: Trainer, pl_module: LightningModule) -> ExportReport:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            with tempfile.TemporaryDirectory() as folder:
                return self._write(trainer, pl_module, Path(folder) / Path(self.path).name)
        module = _restored(trainer, pl_module) if self.checkpoint == "best" else pl_module
        return self._write(trainer, module, self.path)

    def _write(self, trainer: Trainer, module: LightningModule, path: str | os.PathLike[str]) -> ExportReport:
        example = self._example(trainer, module)
        return export_model(
            module,
            example.args,
            path,
            kwargs=example.kwargs,
            exporter=self.exporter,
            parity=self.parity,
            batches=self._recorder.calls,
            validation=self._validation(trainer) if self.top1 else (),
            batch=self.batch,
            latency_runs=self.latency_runs,
            latency_threads=self.latency_threads,
        )

    def _validation(self, trainer: Trainer) -> Iterator[Labelled]:
        """The validation once more; what the module has told an export before this one is known."""
        told = self._told_to_all(trainer)
        for place, asked in enumerate(replayed(trainer, next(iter(self._recorder.calls), None))):
            asked.told = told.get(place)
            yield asked
            if asked.told is not None:
                told[place] = asked.told

    def _told_to_all(self, trainer: Trainer) -> dict[int, Tensor]:
        """Kept by the first of those exports that ask the same weights in the same way."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # an attribute set by a connector
        exports = [one for one in callbacks if isinstance(one, MobileExport)]
        return next(one._told for one in exports if (one.checkpoint, one.batch) == (self.checkpoint, self.batch))

    def _example(self, trainer: Trainer, module: LightningModule) -> ExampleInput:
        if (found := self._capture.example) is not None:
            # A batch has been converted before `forward` saw it, an `example_input_array` is as the user wrote it.
            return ExampleInput(*trainer.precision_plugin.convert_input((found.args, found.kwargs)))
        if self._recorder.calls:
            return self._recorder.calls[0]
        raise LightningLightError(
            f"`MobileExport({str(self.path)!r})` on `{type(module).__name__}`: expected to see what `forward` is "
            "called with; found no `example_input_array`, and no step that calls `self(...)`. Set the first in the "
            "module, or call `export_model(module, (x,), path)` now."
        )

    def _conclude(self, trainer: Trainer, error: BaseException | None) -> None:
        """Every rank learns how it went. If it went wrong, the trained network is saved, then all of them fail."""
        found = None if error is None else f"{type(error).__name__}: {error}"
        failure = broadcast(trainer, found)
        if failure is None or not isinstance(error, Exception | None):
            return
        saved = ""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rescue = f"{self.path}.ckpt"
            trainer.save_checkpoint(rescue)
            saved = f" Nothing is lost: the trained network is in {rescue!r}.{self._others(trainer)}"
        if isinstance(error, LightningLightError):
            raise type(error)(f"{error}{saved}") from error
        raise LightningLightError(
            f"`MobileExport({str(self.path)!r})` failed after training: {failure}{saved}"
        ) from error


def _best_of(trainer: Trainer) -> Any:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # an attribute set by a connector
    found = next((callback for callback in callbacks if is_host(callback, "ModelCheckpoint")), None)
    if found is None:
        raise ValueError(
            "`MobileExport(checkpoint='best')`: expected a `ModelCheckpoint` among the Trainer's callbacks, found "
            "none. Add one with `monitor=...`, or export the last weights: `checkpoint='last'`."
        )
    return found


def _restored(trainer: Trainer, pl_module: LightningModule) -> LightningModule:
    """A copy with the best checkpoint's structure and weights, by the way that the Trainer would load it."""
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
