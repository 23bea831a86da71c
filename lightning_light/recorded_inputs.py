"""Base class of methods that decide by the inputs of the last training batches."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from lightning_light.batch_norm import SAMPLES, InputRecorder
from lightning_light.callback import CompressionCallback
from lightning_light.capture import Capture
from lightning_light.errors import UnsupportedError
from lightning_light.surgery.stored_example import restore_or_capture_example, store_example

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["RecordedInputs"]


class RecordedInputs(CompressionCallback):
    """Keep the calls of the module in the last training batches in the state, under ``"inputs"``.

    So the decision can be made on rank 0 alone, before a batch, and a resumed run makes the same one. A subclass calls
    `record_inputs` in ``on_fit_start``, and sets ``self.recorder.active`` while it needs the inputs.
    """

    function: ClassVar[str]
    """Name of the function of this method, which does the same without a Trainer."""

    captured: Capture | None = None
    recorder: InputRecorder | None = None

    @property
    @abstractmethod
    def recorded_batches(self) -> int:
        """How many batches are kept."""

    def record_inputs(self, pl_module: LightningModule, *keys: str, samples: int | None = SAMPLES) -> None:
        """Capture the example input and the inputs of training batches, and begin the state of a new fit.

        Args:
            pl_module: the module.
            keys: of the state that belong to one fit; they are removed unless the run is resumed.
            samples: of each batch that are kept; None: all.
        """
        state = self.state(pl_module)
        if not self.resumed(pl_module):
            for key in (*keys, "inputs"):
                state.pop(key, None)
        self.captured = restore_or_capture_example(pl_module, state)
        self.recorder = InputRecorder(pl_module, samples)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Store the inputs of this batch, for the decision and for checkpoints."""
        state = self.state(pl_module)
        store_example(state, self.captured)
        assert self.recorder is not None  # since `on_fit_start`
        if not self.recorder.active:
            return
        calls = self.recorder.take()
        if not calls:
            raise UnsupportedError(
                f"`{self!r}` on `{type(pl_module).__name__}`: expected a LightningModule that calls `self(...)` in "
                "`training_step`, with tensors, and is not compiled as a whole, found a step without such a call. Call "
                f"`self(...)` there, or use `{self.function}(..., data=...)` before training."
            )
        state["inputs"] = [*state.get("inputs", []), *calls][-self.recorded_batches :]

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove all hooks."""
        for held in (self.captured, self.recorder):
            if held is not None:
                held.remove()
        self.captured, self.recorder = None, None
        super().teardown(trainer, pl_module, stage)
