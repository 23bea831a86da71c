"""`Substitution`: replace convolutions by lighter operators while the network trains."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from torch import nn
from typing_extensions import override

from lightning_light.budgets import Budget, require_reducible
from lightning_light.criteria.output_distance import Distance
from lightning_light.example_input import ExampleInput
from lightning_light.helper_networks import frozen_parts
from lightning_light.measure.latency_table import LatencyTable, quantity
from lightning_light.order import DEFAULT_WINDOWS, Stage
from lightning_light.progress import epochs_planned
from lightning_light.recorded_inputs import RecordedInputs, RecordedState
from lightning_light.schedules import resolve_moment
from lightning_light.schema import LayerName
from lightning_light.substitution.apply import apply_operators
from lightning_light.substitution.candidates import Candidates, built_operators, find_candidates, require_reachable
from lightning_light.substitution.functional import substitute_operators
from lightning_light.substitution.operators import Operator
from lightning_light.substitution.options import METHOD, SubstitutionOptions
from lightning_light.substitution.plan import SubstitutionPlan, plan_substitution
from lightning_light.surgery.distributed import log_rank_zero
from lightning_light.surgery.stored_example import stored_calls
from lightning_light.surgery.trial import failing_in_step
from lightning_light.targets import Targets, as_targets
from lightning_light.timing import is_due
from lightning_light.validation import Moment, NonNegativeInt, PositiveInt, validated

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

__all__ = ["Substitution"]


class _State(RecordedState, total=False):
    """What a checkpoint holds of a run.

    Attributes:
        done: whether the substitution of this run is done.
        layers: name of each replaced layer -> its operator, in all fits.
        planned: whether the budget was found possible.
    """

    done: bool
    layers: dict[Annotated[str, LayerName()], str]
    planned: bool


@validated
@dataclass(eq=False, repr=False)
class Substitution(RecordedInputs):
    """Replace convolutions by lighter operators, once, such that the network meets ``budget``; training goes on.

    Each operator is fitted to each layer on the inputs that the layer has in the network as trained so far, and scored
    by how much the outputs of the network change with it alone. Of all assignments of operators to layers that meet the
    budget, the one with the lowest sum of scores is taken: the solution of a multiple-choice knapsack problem.

    With ``KnowledgeDistillation(teacher="self")`` in the same run the dense network is the teacher of the lighter one.

    Example:
        >>> from lightning_light.budgets import MACs
        >>> from lightning_light.substitution import Ghost
        >>> Substitution(MACs(0.6), operators=[Ghost(ratio=2)], start=0.2)
        Substitution(budget=MACs(remaining=0.6), operators=[Ghost(ratio=2, kernel_size=3)], start=0.2)

    Args:
        budget: what the network is to reach: ``MACs``, ``Params``, ``Size`` or ``Latency``.
        operators: what may take the place of a convolution: `DepthwiseSeparable`, `GroupShuffle`, `Ghost`, `Fire`,
            `InvertedResidual`, or subclasses of `Operator` of your own. None: as in `substitute_operators`.
        targets: convolutions that may be replaced: patterns or `Targets`; all by default.
        start: when they are replaced; an int is an epoch, a float a fraction of the run.
        fit_steps: optimizer steps in which each candidate is fitted to the layer's outputs; 0 for its start alone.
        distance: of the network's outputs, for the scores: ``"mse"``, the squared error relative to the variance, or
            ``"kl"``, the Kullback-Leibler divergence of class probabilities.
        class_dim: which dimension of the outputs counts classes, for ``"kl"``.
        calibration_batches: training batches before ``start`` on which candidates are fitted and scored and batch-norm
            statistics are corrected; at most 16 samples of each.
        correct_batch_norm: move the batch-norm statistics by what the substitution did to them.
        dry_run: log layers, operators, costs and scores, and replace nothing.

    Raises:
        TypeError: an argument has the wrong type; at construction.
        ValueError: an argument is out of range; at construction.
        BudgetError: the budget cannot be reached; before the first optimizer step.
        TargetError: ``targets`` match no module.
        UnsupportedError: the training step does not call ``self(...)``, a strategy or launcher that cannot follow, or a
            layer that a later method has changed.

    Note:
        Convolutions that cannot be replaced (1x1, grouped, transposed, shared, parametrized, frozen, with forward
        hooks, ...) are left alone; ``dry_run`` and the log at debug level have the reasons.
    """

    method: ClassVar[str] = METHOD
    function: ClassVar[str] = "substitute_operators"
    stage: ClassVar[int] = Stage.SUBSTITUTION
    state_schema: ClassVar[Any] = _State

    budget: Budget
    _: KW_ONLY
    operators: Sequence[Operator] | None = SubstitutionOptions.operators
    targets: Targets | str | list[str] | None = SubstitutionOptions.targets
    start: Moment = DEFAULT_WINDOWS[Stage.SUBSTITUTION][0]
    fit_steps: NonNegativeInt = SubstitutionOptions.fit_steps
    distance: Distance = SubstitutionOptions.distance
    class_dim: int = SubstitutionOptions.class_dim
    calibration_batches: PositiveInt = SubstitutionOptions.calibration_batches
    correct_batch_norm: bool = SubstitutionOptions.correct_batch_norm
    dry_run: bool = False

    def __post_init__(self) -> None:
        require_reducible("Substitution", self.budget, "operators")
        self.options = self.options_as(SubstitutionOptions)
        self.last_plan: SubstitutionPlan | None = None
        self._batch: Any = None

    # Lightning's hooks, in the order a run meets them.

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the targets, and the budget if the example input is known."""
        super().on_fit_start(trainer, pl_module)
        as_targets(self.targets).select(pl_module)
        self.last_plan, self._batch = None, None
        self.record_inputs(pl_module, "done", "planned", "latency")
        self._check_budget(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Act if it is due: before the batch, so that no checkpoint pairs new weights with an old metric."""
        state = self.state(pl_module)
        self._batch = None if state.get("done") else batch
        due = is_due(trainer, resolve_moment(self.start, epochs_planned(trainer), repr(self)))
        if due and not state.get("done") and state.get("planned") and state.get("inputs"):
            self._act(trainer, pl_module)
            state["done"] = True
            state.pop("inputs")
        assert self.recorder is not None  # since `on_fit_start`
        self.recorder.active = not state.get("done")

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Check the budget, if that was not possible before."""
        self._check_budget(trainer, pl_module)

    @override
    def _no_effect_reason(self, pl_module: LightningModule) -> str | None:
        if self.dry_run or self.state(pl_module).get("layers"):
            return None
        if self.last_plan is None:
            return f"the run ended before `start={self.start!r}`."
        return f"the network meets `{self.budget!r}` as it is."

    @override
    def window(self, max_epochs: int | None) -> tuple[float, float] | None:
        """The moment of the substitution."""
        moment = resolve_moment(self.start, max_epochs, repr(self))
        return moment, moment

    @override
    def rehearse(self, model: nn.Module, example: ExampleInput, batches: Sequence[Any]) -> list[str]:
        """Replace the layers by operators at their starts, without fitting them."""
        options: dict[str, Any] = {**vars(self.options), "fit_steps": 0}
        data = list(batches) or None
        return substitute_operators(
            model, example, self.budget, **options, data=data, progress_bar=False
        ).replacements()

    # Private.

    def _check_budget(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse, once per fit and as soon as the example input is known, a budget that cannot be reached.

        Another method that changes the network first may make the budget reachable; the refusal then waits for the
        substitution. Where a network is frozen, the training step is tried with a batch first.
        """
        state = self.state(pl_module)
        if state.get("planned") or not self.has_example(pl_module) or (self._batch is None and frozen_parts(pl_module)):
            return
        if self.changed_before(trainer):
            self._goal(trainer, pl_module)
        else:
            self._candidates(trainer, pl_module)
        state["planned"] = True

    def _goal(self, trainer: Trainer, pl_module: LightningModule) -> float:
        return self.budget.goal(self.reference(trainer, pl_module, self.budget))

    def _candidates(self, trainer: Trainer, pl_module: LightningModule) -> Candidates:
        """Return what may be replaced by what, on every rank alike, for a budget that can be reached."""
        goal, example, budget = self._goal(trainer, pl_module), self.example(pl_module), self.budget

        def find(table: LatencyTable | None) -> tuple[Candidates, float]:
            optimizers = trainer.optimizers
            found = find_candidates(pl_module, budget, example, self.options, optimizers=optimizers, table=table)
            return found, quantity(budget, pl_module, example, table)

        found, now = self.decided(trainer, pl_module, budget, find)
        failing = failing_in_step(pl_module, lambda: built_operators(pl_module, found), self._batch)
        require_reachable(found.without(failing), budget, now, goal)
        return found.without(failing)

    def _act(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the layers: decided and fitted on rank 0, carried out on every rank."""
        state, example = self.state(pl_module), self.example(pl_module)
        goal, candidates = self._goal(trainer, pl_module), self._candidates(trainer, pl_module)
        calls = stored_calls(pl_module, state)

        def plan(table: LatencyTable | None) -> SubstitutionPlan:
            measure = functools.partial(quantity, self.budget, pl_module, example, table)
            found = plan_substitution(pl_module, self.budget, candidates, calls, goal, self.options, measure)
            return replace(found, layers={name: copy.deepcopy(new).cpu() for name, new in found.layers.items()})

        decided = self.last_plan = self.decided(trainer, pl_module, self.budget, plan)
        text = "\n  ".join([f"{self.method}: {decided.summary()}", *decided.lines()])
        if self.dry_run:
            log_rank_zero(trainer, text.replace("replaced", "dry run, would have replaced", 1))
        elif decided.layers:
            replace_layers = functools.partial(apply_operators, pl_module, decided)
            entry = self.change(trainer, pl_module, replace_layers, calls if self.correct_batch_norm else [])
            operators = {name: repr(operator) for name, operator in decided.operators.items()}
            state["layers"] = {**state.get("layers", {}), **operators}
            self.claim(pl_module, state["layers"], follows_cuts=True)
            self._after_surgery(trainer, pl_module, entry, decided.summary())
            log_rank_zero(trainer, text, level=logging.DEBUG)
