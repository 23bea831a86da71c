"""Base class of methods that decide by the inputs of the last training batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict, TypeVar, cast

from typing_extensions import override

from lightning_light.batch_norm import SAMPLES, InputRecorder, Statistics, measure_statistics, move_statistics
from lightning_light.budgets import Budget
from lightning_light.callback import CompressionCallback
from lightning_light.capture import Capture, has_lazy_layers
from lightning_light.errors import UnsupportedError
from lightning_light.example_input import ExampleInput
from lightning_light.measure.latency_table import LatencyTable, TimedFiles, quantity
from lightning_light.progress import epochs_planned, steps_done, steps_planned, training_progress
from lightning_light.schema import PlainExample
from lightning_light.surgery.averaged_models import averaged_models_of
from lightning_light.surgery.distributed import on_rank_zero, reduce_mean
from lightning_light.surgery.edit import Positions
from lightning_light.surgery.stored_example import restore_or_capture_example, store_example
from lightning_light.timing import Events

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_light.criteria import EvidenceCollector
    from lightning_light.criteria.learned_gates import GateTrainer

__all__ = ["RecordedInputs", "RecordedState", "ScheduledChanges"]

T = TypeVar("T")


class RecordedState(TypedDict, total=False):
    """What a checkpoint holds of every such method.

    Attributes:
        example: the example input.
        inputs: calls of the module in the last training batches.
        latency: what was measured in the runtime of the budget.
    """

    example: PlainExample
    inputs: list[PlainExample]
    latency: TimedFiles


class RecordedInputs(CompressionCallback):
    """Keep the calls of the module in the last training batches in the state, under ``"inputs"``.

    So the decision can be made on rank 0 alone, before a batch, and a resumed run makes the same one. A subclass calls
    `record_inputs` in ``on_fit_start``, and sets ``self.recorder.active`` while it needs the inputs.
    """

    function: ClassVar[str]
    """Name of the function of this method, which does the same without a Trainer."""

    requires_calls: ClassVar[bool] = True
    """Whether a training step without a call of the module is refused."""

    calibration_batches: int

    captured = cast("Capture | None", None)  # not annotated, see `CompressionCallback`
    recorder = cast("InputRecorder | None", None)
    _collector = cast("EvidenceCollector | GateTrainer | None", None)

    @property
    def recorded_batches(self) -> int:
        """How many batches are kept."""
        return self.calibration_batches

    def record_inputs(
        self, pl_module: LightningModule, *keys: str, samples: int | None = SAMPLES, recorded: bool = True
    ) -> None:
        """Capture the example input and the inputs of training batches, and begin the state of a new fit.

        Args:
            pl_module: the module.
            keys: of the state that belong to one fit; they are removed unless the run is resumed.
            samples: of each batch that are kept; None: all.
            recorded: whether the inputs of training batches are needed.
        """
        state = self.state(pl_module)
        if not self.resumed(pl_module):
            for key in (*keys, "inputs"):
                state.pop(key, None)
        self.captured = restore_or_capture_example(pl_module, state)
        self.recorder = InputRecorder(pl_module, samples) if recorded else None

    def has_example(self, pl_module: LightningModule) -> bool:
        """Whether the example input is known, and the shape of every parameter."""
        return self.captured is not None and self.captured.example is not None and not has_lazy_layers(pl_module)

    def example(self, pl_module: LightningModule) -> ExampleInput:
        """Return the example input, which is known once the run is planned."""
        assert self.captured is not None
        assert self.captured.example is not None  # `has_example`
        return self.captured.example.to(pl_module)

    def decided(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        budget: Budget | None,
        decide: Callable[[LatencyTable | None], T],
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

    def change(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        apply: Callable[..., T],
        calls: list[ExampleInput],
        kept: Callable[[T], Positions] = lambda _: {},
    ) -> T:
        """Change the network, and move its batch-norm statistics by what that did to them; return ``apply``'s result.

        Args:
            trainer: the Trainer.
            pl_module: the live module.
            apply: changes it, the ``optimizers`` and the ``averaged_models``.
            calls: of rank 0, on which statistics are measured; none: they stay as they are.
            kept: of the result of ``apply``: tensor name -> dimension -> positions that stayed.
        """
        averaged_models = averaged_models_of(trainer, pl_module)
        self._before_surgery(trainer, pl_module)
        before = self.statistics(trainer, pl_module, calls)
        result = apply(optimizers=trainer.optimizers, averaged_models=averaged_models)
        after = self.statistics(trainer, pl_module, calls)
        for network in (pl_module, *averaged_models):
            move_statistics(network, before, after, kept(result))
        return result

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Store the inputs and the evidence of this batch, for the decision and for checkpoints."""
        state = self.state(pl_module)
        store_example(state, self.captured)
        calls = [] if self.recorder is None else self.recorder.take()
        if calls:
            state["inputs"] = [*state.get("inputs", []), *calls][-self.recorded_batches :]
        elif self.requires_calls and self.recorder is not None and self.recorder.active:
            raise UnsupportedError(
                f"`{self!r}` on `{type(pl_module).__name__}`: expected a LightningModule that calls `self(...)` in "
                "`training_step`, with tensors, and is not compiled as a whole, found a step without such a call. Call "
                f"`self(...)` there, or use `{self.function}(..., data=...)` before training."
            )
        if self._collector is not None:
            self._collector.end_batch(lambda tensor: reduce_mean(trainer, tensor))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove all hooks."""
        for held in (self.captured, self.recorder, self._collector):
            if held is not None:
                held.remove()
        self.captured, self.recorder, self._collector = None, None, None
        super().teardown(trainer, pl_module, stage)


class ScheduledChanges(RecordedInputs):
    """Change the network at the events of a schedule, which a subclass sets as ``self._events``."""

    _events = cast("Events", None)
    _points = cast("Sequence[tuple[float, float]]", ())

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Place the events in the run; earlier, its length would lose the position of a resumed loader."""
        super().on_train_start(trainer, pl_module)
        self._points = self._events.points(epochs_planned(trainer), steps_planned(trainer))

    @override
    def window(self, max_epochs: int | None) -> tuple[float, float] | None:
        """From the first event to the last."""
        return self._events.window(max_epochs)

    def _due(self, trainer: Trainer) -> int:
        """Count the events that are due, those before included."""
        return Events.due(self._points, training_progress(trainer), steps_planned(trainer))

    def _is_near(self, trainer: Trainer, event: int, steps: int) -> bool:
        """Check whether the event of that number is at most ``steps`` optimizer steps away, or overdue."""
        if event >= len(self._points):
            return False
        progress, _ = self._points[event]
        return steps_done(trainer) + steps >= progress * steps_planned(trainer)
