"""Base class of methods that decide by the inputs of the last training batches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from typing_extensions import override

from lightning_light.batch_norm import SAMPLES, InputRecorder, Statistics, measure_statistics
from lightning_light.budgets import Budget
from lightning_light.callback import CompressionCallback
from lightning_light.capture import Capture
from lightning_light.errors import UnsupportedError
from lightning_light.example_input import ExampleInput
from lightning_light.measure.latency_table import LatencyTable, quantity
from lightning_light.surgery.distributed import on_rank_zero
from lightning_light.surgery.stored_example import restore_or_capture_example, store_example

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["RecordedInputs"]

T = TypeVar("T")


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

    def example(self, pl_module: LightningModule) -> ExampleInput:
        """Return the example input, which is known once the run is planned."""
        assert self.captured is not None
        assert self.captured.example is not None
        return self.captured.example.to(pl_module)

    def decided(
        self, trainer: Trainer, pl_module: LightningModule, budget: Budget, decide: Callable[[LatencyTable | None], T]
    ) -> T:
        """Return what rank 0 decides, or raise its error, on every rank; keep the latencies that it has measured."""
        state = self.state(pl_module)
        table = LatencyTable.of(budget, state.get("latency"))
        found, timed = on_rank_zero(trainer, lambda: (decide(table), None if table is None else table.used))
        if timed is not None:
            state["latency"] = timed
        return found

    def reference(self, trainer: Trainer, pl_module: LightningModule, budget: Budget) -> float:
        """Return the quantity of ``budget`` before any method changed the network."""
        example = self.example(pl_module)
        return self.compression_state(pl_module).reference(
            budget.quantity,
            lambda: self.decided(trainer, pl_module, budget, lambda table: quantity(budget, pl_module, example, table)),
        )

    def statistics(
        self, trainer: Trainer, pl_module: LightningModule, calls: list[ExampleInput]
    ) -> dict[str, Statistics]:
        """Measure the batch-norm statistics on inputs of rank 0, which a checkpoint holds, for all ranks."""
        return on_rank_zero(trainer, lambda: measure_statistics(pl_module, calls))

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
