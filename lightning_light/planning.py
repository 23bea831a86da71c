"""Plan a whole run: what each method will change, when, and the cost after it, without training."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_light.copies import copy_network
from lightning_light.criteria.evidence import Criterion
from lightning_light.criteria.gathered import PARAMETER_KINDS
from lightning_light.criteria.learned_gates import LearnedGates
from lightning_light.criteria.magnitude import Magnitude
from lightning_light.example_input import ExampleInput, example_of_batch
from lightning_light.formatting import DataTable, Tabular, human_bytes, human_count, human_percent, layer_lines
from lightning_light.isolation import isolated, plain_execution
from lightning_light.measure import Snapshot, count_cost, take_snapshot
from lightning_light.measure.snapshot import layer_stats, matrix_layers
from lightning_light.order import Stage, check_order
from lightning_light.surgery.attachment import state_of
from lightning_light.validation import PositiveInt, validated

__all__ = ["MethodPlan", "RunPlan", "criterion_for", "not_targeted", "plan"]

_BATCHES = 8


@dataclass(frozen=True)
class MethodPlan:
    """What one method will do.

    Attributes:
        method: the callback, as it is written.
        when: the part of the run in which it changes the network: ``"10% to 40%"``.
        position: the same in epochs and steps, as far as they are known.
        lines: ``layer: what happens to it``, or why it is left alone; of an exporter, the file.
        after: the network after it.
    """

    method: str
    when: str
    position: str
    lines: Sequence[str]
    after: Snapshot

    def table(self) -> DataTable:
        """Return the lines as a table."""
        lines = self.lines or ["(network): no layer is changed"]
        table = layer_lines(lines, f"{self.when} of the run{self.position}; after it {', '.join(_costs(self.after))}")
        return DataTable(table.headers, table.lines, (), table.notes, self.method, table.text_columns)


@dataclass(frozen=True)
class RunPlan(Tabular):
    """What a run will do, printed as one table per method and an overview; in a notebook as HTML.

    Attributes:
        before: the network as it is.
        methods: in the order in which they act.
    """

    before: Snapshot
    methods: Sequence[MethodPlan]

    def overview(self) -> DataTable:
        """Return one line per method: when it acts, and the cost after it."""
        first = ("(now)", "", *_cells(self.before))
        lines = [(each.method.partition("(")[0], each.when, *_cells(each.after)) for each in self.methods]
        headers = ("method", "when", *_COSTS)
        return DataTable(headers, (first, *lines), title="Plan of the run", text_columns=frozenset({"when"}))

    @override
    def tables(self) -> list[DataTable]:
        """Return the table of each method, then the overview."""
        return [*(each.table() for each in self.methods), self.overview()]


@validated
def plan(
    model: nn.Module, example_inputs: Any, callbacks: Iterable[Any], *, max_epochs: PositiveInt | None = None
) -> RunPlan:
    """Plan a run without training: what each method changes, leaves alone and why, when, and the cost after it.

    Each method does to a copy of the network what it will have done at the end of its window, one after the other,
    and exporters write their files to a temporary folder. The weights are those of now: which channels or weights are
    chosen may differ after training, how many does not. The network, its optimizers, the callbacks and the random state
    stay as they are.

    Args:
        model: a LightningModule or any module.
        example_inputs: what ``forward`` is called with: a tensor, a tuple or a dict; or a data module, a loader or a
            list of batches, of which the first eight are used where a method needs data.
        callbacks: those of the Trainer; others than the methods of this package are skipped.
        max_epochs: of the run; with it, and with data, the plan gives epochs and steps.

    Raises:
        ValueError: no method is among the callbacks, or a schedule counts epochs and ``max_epochs`` is None.
        LightningLightError: what the run would be refused for: an order, a budget, targets, layers.

    Example:
        >>> from torch import nn
        >>> from lightning_light import MACs, StructuredPruning
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> print(plan(model, torch.zeros(2, 8), [StructuredPruning(MACs(0.5))]))
        StructuredPruning(budget=MACs(remaining=0.5))
          layer  plan
         ─────────────────────────────────────────
          0      32 -> 16 channels
          2      kept (produces the model output)
        <BLANKLINE>
        10% to 40% of the run; after it 192 MACs, 212 params, 848B, sparsity 0%
        <BLANKLINE>
                               Plan of the run
          method             when        MACs  params    size  sparsity
         ───────────────────────────────────────────────────────────────
          (now)                           384     420  1.68kB        0%
          StructuredPruning  10% to 40%   192     212    848B        0%
    """
    methods = [each for each in callbacks if hasattr(each, "rehearse")]
    if not methods:
        raise ValueError(
            "`plan(model, example_inputs, callbacks)`: expected a method among the callbacks, found none. Give the "
            "list that the Trainer gets: `[StructuredPruning(MACs(0.4)), MobileExport('model.ptl')]`."
        )
    check_order([(type(each).__name__, each.stage, each.window(max_epochs)) for each in methods])
    copied = copy_network(model)
    with isolated(copied):
        example, batches, per_epoch = _read(copied, example_inputs)
        steps = None if per_epoch is None or max_epochs is None else per_epoch * max_epochs
        before, plans = _snapshot(copied, example), []
        for method in sorted(methods, key=lambda each: each.stage):
            lines = method.rehearse(copied, example, batches)
            if lines or method.stage < Stage.MONITORS:
                when = _when(method.window(max_epochs), method.stage, max_epochs, steps)
                plans.append(MethodPlan(repr(method), *when, lines, _snapshot(copied, example)))
    return RunPlan(before, plans)


def criterion_for(model: nn.Module, criterion: Criterion, batches: Sequence[Any]) -> tuple[Criterion, list[str]]:
    """Return the criterion of a rehearsal: another, with a line on it, where the given one has nothing to read.

    Args:
        model: of which a training step gives gradients.
        criterion: of the method.
        batches: of training; none where only an example is known.
    """
    needs_gradients = bool(criterion.needs & PARAMETER_KINDS)
    if not isinstance(criterion, LearnedGates) and not (
        needs_gradients and not (batches and hasattr(model, "training_step"))
    ):
        return criterion, []
    return Magnitude(), [f"(network): chosen here by {Magnitude()!r}; {criterion!r} needs the batches of the training"]


def not_targeted(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """Return a line for each layer with weights that is not in ``layers``."""
    known = set(layers)
    return [
        f"{name or '(model)'}: left alone (not among the targets)" for name in matrix_layers(model) if name not in known
    ]


_COSTS = ("MACs", "params", "size", "sparsity")


def _cells(found: Snapshot) -> tuple[str, ...]:
    macs = "" if found.macs is None else human_count(found.macs)
    return macs, human_count(found.params), human_bytes(found.bytes), human_percent(found.sparsity)


def _costs(found: Snapshot) -> tuple[str, ...]:
    macs, params, size, sparsity = _cells(found)
    return f"{macs} MACs", f"{params} params", size, f"sparsity {sparsity}"


def _snapshot(model: nn.Module, example: ExampleInput) -> Snapshot:
    call = example.small(1).to(model)
    return take_snapshot(model, count_cost(model, call.args, call.kwargs), layer_stats(state_of(model).state))


def _when(window: tuple[float, float] | None, stage: int, max_epochs: int | None, steps: int | None) -> tuple[str, str]:
    if window is None:
        return ("the end" if stage >= Stage.EXPORT else "all"), ""
    epochs = "" if max_epochs is None else f", epochs {_range(window, '{:.3g}', max_epochs)}"
    return _range(window, "{:.0%}", 1.0), epochs + (
        "" if steps is None else f", steps {_range(window, '{:.0f}', steps)}"
    )


def _range(window: tuple[float, float], form: str, scale: float) -> str:
    start, end = (form.format(scale * moment) for moment in window)
    return start if start == end else f"{start} to {end}"


def _read(model: nn.Module, given: Any) -> tuple[ExampleInput, list[Any], int | None]:
    """Return an example input, batches if there are data, and the number of batches per epoch."""
    loader = _loader(given)
    if loader is None:
        array = getattr(model, "example_input_array", None) if given is None else given
        return ExampleInput.of(array).to(model), [], None
    with plain_execution():
        batches = list(islice(iter(loader), _BATCHES))
    array = getattr(model, "example_input_array", None)
    example = example_of_batch(batches[0], model) if array is None else ExampleInput.of(array).to(model)
    try:
        return example, batches, len(loader)
    except TypeError:  # of an iterable data set
        return example, batches, None


def _loader(given: Any) -> Any:
    """Return the training loader of a data module, or the loader that is given; None for example inputs."""
    if not hasattr(given, "train_dataloader"):
        is_example = isinstance(given, Tensor | tuple | Mapping | ExampleInput) or not isinstance(given, Iterable)
        return None if is_example else given
    data = copy.copy(given)  # `setup` writes to it
    data.prepare_data()
    data.setup("fit")
    return data.train_dataloader()
