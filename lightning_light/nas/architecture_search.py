"""`ArchitectureSearch`: choose widths, ranks and depth under several budgets while the network trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

from torch import nn
from typing_extensions import override

from lightning_light.budgets import Budget
from lightning_light.callback import CompressionCallback
from lightning_light.capture import has_lazy_layers
from lightning_light.criteria.output_distance import Distance
from lightning_light.errors import UnsupportedError
from lightning_light.example_input import ExampleInput
from lightning_light.export.exporter import Exporter
from lightning_light.host.trainer import callbacks_of
from lightning_light.isolation import plain_execution
from lightning_light.nas.apply import claim_layers, in_order
from lightning_light.nas.choices import Item
from lightning_light.nas.costs import Costs
from lightning_light.nas.functional import check_counts, find_assignment, search
from lightning_light.nas.options import SearchOptions, Space, check_budgets
from lightning_light.nas.result import SearchResult
from lightning_light.order import Stage
from lightning_light.recorded_inputs import RecordedState, ScheduledChanges
from lightning_light.schedules import OneShot, Schedule, require_rising
from lightning_light.surgery.distributed import log_rank_zero, on_rank_zero
from lightning_light.surgery.stored_example import stored_calls
from lightning_light.timing import Events
from lightning_light.validation import NonNegativeInt, PositiveInt, validated

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["ArchitectureSearch"]


class _PlainItem(TypedDict):
    """An `Item` in plain types."""

    kind: str
    target: str
    choice: str
    layers: list[str]


class _State(RecordedState, total=False):
    """What a checkpoint holds of a run.

    Attributes:
        planned: whether the counted budgets were found possible.
        searched: whether the search of this fit is done.
        count: of the items that the search has chosen.
        pending: those that are not carried out yet, in order.
        items: names of the items that were carried out, in all fits.
    """

    planned: bool
    searched: bool
    count: int
    pending: list[_PlainItem]
    items: list[str]


@validated
@dataclass(eq=False, repr=False)
class ArchitectureSearch(ScheduledChanges):
    """Choose widths, ranks and depth under one or several budgets at one point of the run, and train on.

    The search is that of `lightning_light.search`, on the inputs of the last training batches: those of the first are
    for batch-norm statistics, the others, held back, for the comparison of outputs. At the first step of the schedule
    the assignment is chosen; of its changes the fraction that the schedule gives is made at each step: first blocks are
    removed, then operators replaced, then channels removed, then layers factorized. The optimizers follow. Add
    ``KnowledgeDistillation(teacher="self")`` for the network before the change as teacher, and
    ``QuantizationAwareTraining`` for an int8 file.

    Example:
        >>> from lightning_light.budgets import MACs, Size
        >>> ArchitectureSearch([MACs(0.5), Size("200 kB")], evaluations=30)
        ArchitectureSearch(budget=[MACs(remaining=0.5), Size(limit='200 kB')], evaluations=30)

    Args:
        budget: what the network is to reach: ``MACs``, ``Params``, ``Size`` or ``Latency``, or several at once.
        schedule: fraction of the changes that are made by a point of the run. `OneShot` makes all at once;
            ``Window(Linear(), start=0.1, end=0.4)`` makes them in ten portions.
        space: see `SearchOptions`. With a recipe the costs are those of int8 files; the run needs a
            ``QuantizationAwareTraining``.
        runtime: see `SearchOptions`.
        distance: see `SearchOptions`.
        class_dim: see `SearchOptions`.
        calibration_batches: see `SearchOptions`.
        evaluation_batches: see `SearchOptions`.
        samples: of each training batch that are used; a checkpoint before the search contains them.
        evaluations: see `SearchOptions`.
        seed: see `SearchOptions`.
        table: see `SearchOptions`. Measured latencies differ from run to run: an interrupted run makes the same
            choices again only with the table on disk.

    Raises:
        TypeError: an argument has the wrong type; at construction.
        ValueError: an argument is out of range, budgets or space contradict each other, or the schedule falls; at
            construction.
        BudgetError: the budgets cannot be reached; where they are counted, before the first optimizer step.
        TargetError: the targets of a kind match nothing.
        UnsupportedError: the training step does not call ``self(...)``, or calls parts of the module beside it; a
            recipe without quantization-aware training; a strategy or launcher that cannot follow.

    Attributes:
        result: of the search on rank 0, with its table; None before, and after a resume.
    """

    method: ClassVar[str] = "architecture_search"
    function: ClassVar[str] = "lightning_light.search"
    stage: ClassVar[int] = Stage.DEPTH
    state_schema: ClassVar[Any] = _State

    budget: Budget | Sequence[Budget]
    _: KW_ONLY
    schedule: Schedule = OneShot(at=0.1)
    space: Space | None = SearchOptions.space
    runtime: Exporter | None = SearchOptions.runtime
    distance: Distance = SearchOptions.distance
    class_dim: int = SearchOptions.class_dim
    calibration_batches: PositiveInt = SearchOptions.calibration_batches
    evaluation_batches: PositiveInt = SearchOptions.evaluation_batches
    samples: PositiveInt = 128
    evaluations: NonNegativeInt = SearchOptions.evaluations
    seed: NonNegativeInt = SearchOptions.seed
    table: str | Path | None = SearchOptions.table

    def __post_init__(self) -> None:
        require_rising("ArchitectureSearch", self.schedule)
        self.options = self.options_as(SearchOptions)
        self._budgets = check_budgets("ArchitectureSearch", self.budget, self.options)
        self._events = Events(self.schedule)
        self.result: SearchResult | None = None

    @property
    @override
    def recorded_batches(self) -> int:
        return self.calibration_batches + self.evaluation_batches

    # Lightning's hooks, in the order a run meets them.

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what is quantized, and the counted budgets if the example input is known."""
        super().on_fit_start(trainer, pl_module)
        peers = [peer for peer in callbacks_of(trainer) if isinstance(peer, CompressionCallback)]
        if self.options.recipe is not None and all(peer.int8_weights() is None for peer in peers):
            raise UnsupportedError(
                f"`{self!r}`: expected a method that quantizes the network in this run, since the costs are those of "
                f"int8 files, found none. Add `QuantizationAwareTraining({self.options.recipe!r})` to the Trainer."
            )
        self.result = None
        self.record_inputs(pl_module, "planned", "searched", "count", "pending", samples=self.samples)
        self._plan_run(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Act if it is due: before the batch, so that no checkpoint pairs new weights with an old metric."""
        state = self.state(pl_module)
        assert self.captured is not None  # since `on_fit_start`
        assert self.recorder is not None
        if not state.get("searched") and self.captured.observed is None and not has_lazy_layers(pl_module):
            self._check_step(pl_module, batch)
            self._plan_run(trainer, pl_module)
        due = self._due(trainer)
        if due and not state.get("searched") and len(state.get("inputs", [])) == self.recorded_batches:
            self._search(trainer, pl_module)
        if due and "pending" in state:
            self._change(trainer, pl_module, self._points[due - 1][1])
        self.recorder.active = self._is_near(trainer, 0, self.recorded_batches) and not state.get("searched")

    @override
    def _no_effect_reason(self, pl_module: LightningModule) -> str | None:
        state = self.state(pl_module)
        if state.get("searched"):
            return None if state.get("items") else f"the network meets `{self.budget!r}` as it is."
        return (
            f"the run ended before the search, which needs the inputs of {self.recorded_batches} training batches; "
            f"`schedule={self.schedule!r}`."
        )

    @override
    def rehearse(self, model: nn.Module, example: ExampleInput, batches: Sequence[Any]) -> list[str]:
        """Change the copy as the exact solution for the counted budgets, without comparing whole networks."""
        files = self.options.recipe is not None or any(budget.runs_model for budget in self._budgets)
        if files or len(batches) < 2:
            needed = "measured files" if files else "two training batches"
            return [f"(network): chosen in the run, which needs {needed}"]
        options = {**vars(self.options), "evaluations": 0, "table": None}
        return search(model, example, self.budget, data=batches, **options, progress_bar=False).lines()

    # Private.

    def _check_step(self, pl_module: LightningModule, batch: Any) -> None:
        """Refuse a training step that reads what the comparison of outputs does not show."""
        assert self.captured is not None
        found = self.captured.observe(pl_module, batch)
        if not found.only_forward:
            raise UnsupportedError(
                f"`{self!r}` on `{type(pl_module).__name__}`: expected a training step that calls `self(...)` and no "
                f"part of the module beside it, found another{f' ({found.error})' if found.error else ''}. Call "
                "`self(...)` alone, or use `lightning_light.search(..., data=...)` before training."
            )

    def _plan_run(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check, once per fit and as soon as the example input is known, that the counted budgets can be reached."""
        state = self.state(pl_module)
        if not state.get("planned") and self.has_example(pl_module):
            example, references = self.example(pl_module), self._references(trainer, pl_module)

            @plain_execution()
            def check() -> None:
                check_counts("ArchitectureSearch", pl_module, example, self._budgets, self.options, references)

            on_rank_zero(trainer, check)
            state["planned"] = True

    def _references(self, trainer: Trainer, pl_module: LightningModule) -> Costs:
        """Return the counted quantities before any method changed the network."""
        counted = [budget for budget in self._budgets if not budget.runs_model]
        return {budget.quantity: self.reference(trainer, pl_module, budget) for budget in counted}

    def _search(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search on rank 0, and keep the chosen items for all."""
        state = self.state(pl_module)
        log_rank_zero(trainer, f"{self.method}: search on the inputs of {self.recorded_batches} training batches")
        calls, example = stored_calls(pl_module, state), self.example(pl_module)
        parts = calls[: self.calibration_batches], calls[self.calibration_batches :]
        given = (example, self._budgets, self.options, parts, self._references(trainer, pl_module))
        shown = trainer.progress_bar_callback is not None

        @plain_execution()
        def find() -> list[dict[str, Any]]:
            self.result = find_assignment("ArchitectureSearch", pl_module, *given, progress_bar=shown)
            ordered = [item for _, mine in in_order(self.options.choices, self.result.items) for item in mine]
            return [item.plain() for item in ordered]

        state["pending"] = on_rank_zero(trainer, find)
        state["count"], state["searched"] = len(state["pending"]), True
        state["inputs"] = state["inputs"][: self.calibration_batches]

    def _change(self, trainer: Trainer, pl_module: LightningModule, fraction: float) -> None:
        """Carry out so many of the pending items that ``fraction`` of all are done."""
        state, example = self.state(pl_module), self.example(pl_module)
        calls = stored_calls(pl_module, state)
        left = round((1.0 - fraction) * state["count"])
        items = [Item.of(plain) for plain in state["pending"][: max(0, len(state["pending"]) - left)]]
        steps = list(in_order(self.options.choices, items))
        for number, (choices, mine) in enumerate(steps, 1):
            planned = plain_execution()(partial(choices.plan, pl_module, example, mine, calls))
            plan = on_rank_zero(trainer, planned)
            carry_out = partial(choices.carry_out, pl_module, plan)
            change = self.change(trainer, pl_module, carry_out, calls, kept=lambda done: done.kept or {})
            claim_layers(pl_module, choices, change)
            summary, part = f"changed {choices.kind}", f"{number}/{len(steps)}"
            self._after_surgery(trainer, pl_module, change.entry, summary, part=part, kept=change.kept)
        state["items"] = [*state.get("items", []), *(item.name for item in items)]
        state["pending"] = state["pending"][len(items) :]
        if not state["pending"]:
            del state["pending"], state["inputs"]
