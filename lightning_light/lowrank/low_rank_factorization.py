"""Low-rank factorization of layers during a training run."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

from torch import Tensor, nn
from typing_extensions import override

from lightning_light.batch_norm import has_statistics
from lightning_light.budgets import Budget
from lightning_light.criteria.collector import EvidenceCollector
from lightning_light.criteria.gathered import EvidenceStorage
from lightning_light.example_input import ExampleInput
from lightning_light.helper_networks import frozen_parts
from lightning_light.lowrank.apply import METHOD, apply_factors, check_unowned
from lightning_light.lowrank.calibration import first_batches, watched_modules
from lightning_light.lowrank.factors import factor_form
from lightning_light.lowrank.fits import Fit
from lightning_light.lowrank.functional import factorize, plan_layers, require_file_reachable
from lightning_light.lowrank.layers import FactorizableLayer, exact_replacements, find_layers
from lightning_light.lowrank.measurement import LayerTimer, goal_of, quantity_of
from lightning_light.lowrank.options import FactorizationOptions, Form, RankAllocation, candidate_forms, check_request
from lightning_light.lowrank.plan import FactorizationPlan, Goal, Planner, require_reachable
from lightning_light.lowrank.ranks import RankRule
from lightning_light.lowrank.regularize import RankRegularizer, add_regularizer_gradients
from lightning_light.measure.latency_table import LatencyTable
from lightning_light.order import DEFAULT_WINDOWS, Stage
from lightning_light.recorded_inputs import RecordedState, ScheduledChanges
from lightning_light.schedules import OneShot, Schedule, Window, require_rising
from lightning_light.surgery.distributed import log_rank_zero
from lightning_light.surgery.stored_example import stored_calls
from lightning_light.surgery.trial import failing_in_step
from lightning_light.targets import Targets, as_targets
from lightning_light.timing import Events
from lightning_light.training_step import callable_with
from lightning_light.validation import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, validated

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

__all__ = ["LowRankFactorization"]

_EVENTS = 5


class LayerState(TypedDict):
    """Factors of one layer, for checkpoints and monitors."""

    form: str
    ranks: list[PositiveInt]
    rank: PositiveFloat
    full: list[PositiveInt]
    energy_kept: NonNegativeFloat
    reconstruction_error: NonNegativeFloat


class LowRankState(RecordedState, total=False):
    """State of a `LowRankFactorization` in checkpoints.

    Attributes:
        names: the targets.
        events: number of events that are done.
        fraction: of the way to the budget, at the last event.
        final_forms: layers that the first plan factorizes, and their forms.
        layers: name -> factors.
        evidence: storage of the `EvidenceCollector`.
    """

    names: list[str]
    events: NonNegativeInt
    fraction: Fraction
    final_forms: dict[str, str]
    layers: dict[str, LayerState]
    evidence: EvidenceStorage


@validated
@dataclass(eq=False, repr=False)
class LowRankFactorization(ScheduledChanges):
    """Replace layers by low-rank factors within a budget, and continue training.

    Only layers whose factors are smaller and cheaper are replaced. The factors are an ``nn.Sequential`` of ``torch.nn``
    layers, and the optimizer owns their weights at the same place of the same parameter group.

    Linear layers use the singular value decomposition. Convolutions use one of four forms: ``"channel"``, kxk then 1x1
    (Zhang et al., 2016, https://arxiv.org/abs/1505.06798); ``"spatial"``, kx1 then 1xk (Jaderberg et al., 2014,
    https://arxiv.org/abs/1405.3866, in the closed form of Tai et al., 2016, https://arxiv.org/abs/1511.06067);
    ``"tucker2"``, 1x1, kxk, 1x1 (Kim et al., 2016, https://arxiv.org/abs/1511.06530); or ``"depthwise"``, a depthwise
    kxk and a pointwise layer, in the order that loses less (Guo et al., 2018, https://arxiv.org/abs/1808.05517).

    The whole run is planned before the first layer is replaced: an unreachable budget is refused with nothing changed.

    Example:
        >>> from lightning_light.budgets import MACs
        >>> LowRankFactorization(MACs(0.5), form="tucker2")
        LowRankFactorization(budget=MACs(remaining=0.5), form='tucker2')

    Args:
        budget: what the network is to reach: ``MACs``, ``Params``, ``Size`` or ``Latency`` (of the layers on the
            training device, or of the written file in a ``runtime``), with ranks chosen over all layers at once. Or a
            rule for the ranks of each layer: ``RetainedEnergy``, ``RankRatio``, ``EVBMF`` or ``OutputChange``.
        schedule: training progress -> fraction of the way to the budget. With a continuous schedule the ranks decrease
            in steps, each time chosen from the factors as they have been trained.
        every_n_steps: optimizer steps between two steps of a continuous schedule; 5 evenly spaced ones by default.
        fit: the norm in which the approximation is optimal: ``WeightSVD``, ``WhitenedSVD``, ``ActivationSVD`` or
            ``FisherSVD``. With all but the first, convolutions use the ``"channel"`` form.
        form: of factorized convolutions; ``"auto"`` chooses per layer what loses least for the cost,
            of ``"depthwise"`` only under a ``Latency``: such layers save more multiply-accumulates than time.
        targets: layers that may be replaced: patterns or `Targets`.
        split: pattern of a fused linear layer, or of a `torch.nn.MultiheadAttention` -> number of equal parts of it, or
            of each of its projections; every part gets its own ranks: ``{"*.qkv": 3}``, or ``{"*.attention": heads}``
            for ranks per head. By default an attention has its four projections.
        allocation: constraints on the ranks, and how errors of different layers are compared.
        data: batches for the fit or the measured output, instead of those of training. The first item of a tuple is the
            network's input; a mapping is its keyword arguments. Gradients always come from training.
        calibration_batches: number of batches that a data-dependent fit or rule looks at, and of the batches before
            the last step from which batch-norm statistics are corrected.
        correct_batch_norm: after the last step, move the batch-norm statistics by what the factorization changed.
        regularizer: `NuclearNorm` or `Orthogonality` on the weights of the layers until the first of them is replaced.
        dry_run: log the plan and change nothing.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, or a schedule that falls.
        BudgetError: the budget cannot be reached; raised before anything is changed.
        TargetError: ``targets`` match nothing.
        UnsupportedError: a strategy, launcher or optimizer that cannot follow.
    """

    method: ClassVar[str] = METHOD
    function: ClassVar[str] = "factorize"
    requires_calls: ClassVar[bool] = False
    stage: ClassVar[int] = Stage.FACTORS
    state_schema: ClassVar[Any] = LowRankState

    budget: Budget | RankRule
    _: KW_ONLY
    schedule: Schedule = Window(OneShot(), *DEFAULT_WINDOWS[Stage.FACTORS])
    every_n_steps: PositiveInt | None = None
    fit: Fit = FactorizationOptions.fit
    form: Form = FactorizationOptions.form
    targets: Targets | str | list[str] | None = FactorizationOptions.targets
    split: dict[str, int] | None = FactorizationOptions.split
    allocation: RankAllocation = FactorizationOptions.allocation
    data: Iterable[Any] | None = None
    calibration_batches: PositiveInt = FactorizationOptions.calibration_batches
    correct_batch_norm: bool = FactorizationOptions.correct_batch_norm
    regularizer: RankRegularizer | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        self.options = self.options_as(FactorizationOptions)
        call = type(self).__name__
        check_request(call, self.budget, self.options, has_data=self.data is not None)
        require_rising(call, self.schedule)
        self._events = Events(self.schedule, self.every_n_steps, default_events=_EVENTS)
        _check_one_shot(call, self.budget, self.schedule)
        self.last_plan: FactorizationPlan | None = None
        self._collector: EvidenceCollector | None = None
        self._is_checked = False
        self._first_batch: Any = None
        self._failing_in_step: dict[str, str] = {}

    # Lightning's hooks, in the order a run meets them.

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Name the targets as the layers are now, and measure the dense network if its input is known."""
        super().on_fit_start(trainer, pl_module)
        corrects = self.correct_batch_norm and not self.dry_run and has_statistics(pl_module)
        of_one_fit = ("events", "evidence", "fraction", "final_forms", "latency")
        self.record_inputs(pl_module, *of_one_fit, recorded=corrects)
        state = self.state(pl_module)
        if "names" not in state:
            state["names"] = list(as_targets(self.targets).select(pl_module))
        self.last_plan, self._is_checked, self._failing_in_step, self._points = None, False, {}, []
        self._check(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Factorize if it is due: before the batch, so that no checkpoint pairs new weights with an old metric."""
        self._check(trainer, pl_module, batch)
        state = self.state(pl_module)
        due = self._due(trainer)
        if due > state.get("events", 0) and self._is_ready(pl_module):
            if not state.get("events"):
                self._helper_networks(trainer, pl_module, batch)  # logs them; the plan leaves them alone
            self._factorize(trainer, pl_module, due)
        is_near, done = partial(self._is_near, trainer, steps=self.calibration_batches), state.get("events", 0)
        if self._gathers and self.has_example(pl_module) and is_near(done):
            self._collect(pl_module).begin_batch()
        if self.recorder is not None:
            last = len(self._points) - 1
            self.recorder.active = done <= last and is_near(last)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Refuse an unreachable budget before the first step; gather gradients, then add that of the regularizer."""
        self._check(trainer, pl_module)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self._collector is not None:
            self._collector.observe_step(parameters)
        if self.regularizer is not None and not self.state(pl_module).get("events", 0):
            add_regularizer_gradients(self.regularizer, self._regularized(pl_module), parameters)

    @override
    def before_surgery(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the dense network before another method changes it."""
        self._check(trainer, pl_module)

    @override
    def on_surgery(
        self, trainer: Trainer, pl_module: LightningModule, kept: Mapping[str, Mapping[int, Tensor]] | None
    ) -> None:
        """Let the evidence follow a change of shapes."""
        if self.state(pl_module).get("evidence"):
            self._collect(pl_module).follow(kept)

    @override
    def rehearse(self, model: nn.Module, example: ExampleInput, batches: Sequence[Any]) -> list[str]:
        """Factorize the layers."""
        data = self.data or list(batches) or [example]
        return factorize(model, example, self.budget, **vars(self.options), data=data).lines()

    # Planning.

    def _check(self, trainer: Trainer, pl_module: LightningModule, batch: Any = None) -> None:
        """Measure the dense network, and refuse an unreachable budget, as soon as the input and a batch are known.

        Another method that changes the network first may make the budget reachable; the refusal then waits for the
        first event.
        """
        if self.captured is not None:
            self.captured.require(repr(self))
        self._first_batch = batch if self._first_batch is None and not self._is_checked else self._first_batch
        if self._is_checked or not self.has_example(pl_module):
            return
        goal = self._goal(trainer, pl_module, fraction=1.0)
        if self._first_batch is None and frozen_parts(pl_module):
            return
        self._try_step(trainer, pl_module)
        self._is_checked, self._first_batch = True, None
        if self.state(pl_module).get("events", 0) or self.changed_before(trainer):
            return
        layers, _ = self._layers(pl_module)
        check_unowned(pl_module, [layer.owner or layer.name for layer in layers])
        planner, example = Planner(layers, {}, self.options, goal, LayerTimer(pl_module)), self.example(pl_module)

        def check(table: LatencyTable | None) -> None:
            require_reachable(layers, self.allocation, goal)
            if table is not None:
                with callable_with(pl_module, example):
                    require_file_reachable(pl_module, replace(planner, goal=replace(goal, table=table)), example)

        self.decided(trainer, pl_module, self._limited, check)

    @property
    def _limited(self) -> Budget | None:
        """The budget; None under a rule."""
        return None if isinstance(self.budget, RankRule) else self.budget

    def _try_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave alone the layers without which the training step does not run."""

        def replacements() -> dict[str, nn.Module]:
            return exact_replacements(pl_module, self._layers(pl_module)[0])

        self._failing_in_step = failing_in_step(pl_module, replacements, self._first_batch)
        for name, reason in self._failing_in_step.items():
            log_rank_zero(trainer, f"{self.method}: {name} left alone: {reason}")

    def _goal(self, trainer: Trainer, pl_module: LightningModule, fraction: float) -> Goal:
        """Return the goal of an event; what is measured is measured on rank 0."""
        example = self.example(pl_module)
        with callable_with(pl_module, example):
            measure = partial(quantity_of, self.budget, pl_module, example)
            current = self.decided(trainer, pl_module, self._limited, measure)
        return goal_of(self.budget, pl_module, current, fraction=fraction)

    def _plan(self, trainer: Trainer, pl_module: LightningModule, fraction: float) -> FactorizationPlan:
        """Return the plan of rank 0, with its factors, on every rank."""
        goal = self._goal(trainer, pl_module, fraction)

        def plan(table: LatencyTable | None) -> FactorizationPlan:
            layers, reasons = self._layers(pl_module)
            return plan_layers(
                pl_module,
                layers,
                reasons,
                replace(goal, table=table),
                self.options,
                gathered=self._collect(pl_module).means() if self._gathers else None,
                batches=first_batches(self.data, self.calibration_batches),
                known_faster=self.state(pl_module).get("final_forms", {}),
                example=self.example(pl_module),
            )

        return self.decided(trainer, pl_module, self._limited, plan)

    def _layers(self, pl_module: LightningModule) -> tuple[list[FactorizableLayer], dict[str, str]]:
        state = self.state(pl_module)
        factorized = state.get("layers", {})
        names = dict.fromkeys([*state["names"], *factorized])
        shrinkable = () if isinstance(self.budget, RankRule) else factorized  # a rule is applied once
        example = self.example(pl_module)
        with callable_with(pl_module, example):
            form, split = candidate_forms(self.form, self.budget), self.split or {}
            layers, reasons = find_layers(pl_module, example, names, form=form, split=split, shrinkable=shrinkable)
        free = [layer for layer in layers if (layer.owner or layer.name) not in self._failing_in_step]
        return free, reasons | self._failing_in_step

    # Acting.

    def _factorize(self, trainer: Trainer, pl_module: LightningModule, due: int) -> None:
        """Plan on rank 0, and replace the layers on every rank."""
        fraction = self._points[due - 1][1]
        plan = self._plan(trainer, pl_module, fraction)
        self.last_plan = plan
        if self._collector is not None:
            self._collector.remove()
            self._collector = None
        state = self.state(pl_module)
        state.pop("evidence", None)
        if self.dry_run:
            log_rank_zero(trainer, "\n  ".join([f"{self.method}: dry run, would have {plan.summary()}", *plan.lines()]))
        elif plan.layers:
            self._carry_out(trainer, pl_module, plan, due)
        state.setdefault("final_forms", plan.final_forms)
        if due == len(self._points):
            state.pop("inputs", None)
        state |= {"events": due, "fraction": fraction}
        kept = ("rank", "energy_kept", "reconstruction_error")
        facts = {f"{key}/{name}": layer[key] for name, layer in state.get("layers", {}).items() for key in kept}
        self.log_scalars(trainer, {"fraction": fraction, plan.quantity: plan.after, **facts})

    def _carry_out(self, trainer: Trainer, pl_module: LightningModule, plan: FactorizationPlan, due: int) -> None:
        """Replace the layers; at the last event, correct the batch-norm statistics."""
        state, last = self.state(pl_module), due == len(self._points)
        calls = stored_calls(pl_module, state) if last and self.recorder is not None else []
        entry = self.change(trainer, pl_module, partial(apply_factors, pl_module, plan), calls)
        state["layers"] = {**state.get("layers", {}), **_layer_states(plan)}
        self.claim(pl_module, state["layers"])
        self._after_surgery(trainer, pl_module, entry, plan.summary(), part=f"{due}/{len(self._points)}")
        log_rank_zero(trainer, "\n  ".join([f"{self.method}: {plan.summary()}", *plan.lines()]), level=logging.DEBUG)

    # Evidence.

    @property
    def _gathers(self) -> bool:
        """Whether the evidence comes from the batches of training."""
        return bool(self.fit.needs) and (self.data is None or "grad_squared" in self.fit.needs)

    def _is_ready(self, pl_module: LightningModule) -> bool:
        if not self.has_example(pl_module):
            return False
        return not self._gathers or self._collect(pl_module).batches >= self.calibration_batches

    def _collect(self, pl_module: LightningModule) -> EvidenceCollector:
        if self._collector is None:
            layers, _ = self._layers(pl_module)
            self._collector = EvidenceCollector(
                pl_module,
                watched_modules(pl_module, layers),
                self.fit.needs,
                lambda: self.state(pl_module).setdefault("evidence", {}),
            )
        return self._collector

    def _regularized(self, pl_module: LightningModule) -> list[nn.Module]:
        named = dict(pl_module.named_modules(remove_duplicate=False))
        modules = (named[name] for name in self.state(pl_module)["names"] if name in named)
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        return [module for module in modules if isinstance(module, kinds) and factor_form(module) is None]

    @override
    def _no_effect_reason(self, pl_module: LightningModule) -> str | None:
        if self.dry_run or self.state(pl_module).get("layers"):
            return None
        if self.last_plan is not None:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.last_plan.skipped.items())
            return f"no layer was factorized. {reasons}"
        if self._gathers:
            return f"the run ended before {self.calibration_batches} calibration batches; lower `calibration_batches`."
        return f"the run ended before the first event, at {self._points[0][0]:.0%} of the run."


def _check_one_shot(call: str, budget: Budget | RankRule, schedule: Schedule) -> None:
    """Refuse to follow a continuous schedule with a rule, which is applied once."""
    changes = schedule.changes()
    if isinstance(budget, RankRule) and (changes is None or len(changes) > 1):
        raise ValueError(
            f"`{call}({budget!r}, schedule={schedule!r})`: expected a schedule of one step for a rule, which is "
            "applied once, found one that rises in several steps. Write `schedule=OneShot(at=0.5)`, or give a budget."
        )


def _layer_states(plan: FactorizationPlan) -> dict[str, LayerState]:
    """Describe the factorized layers in plain types, for checkpoints and monitors."""
    return {
        name: {
            "form": layer.form,
            "ranks": list(layer.ranks),
            "rank": float(max(layer.ranks)),
            "full": list(layer.full),
            "energy_kept": 1.0 - layer.error,
            "reconstruction_error": max(layer.error, 0.0) ** 0.5,
        }
        for name, layer in plan.layers.items()
    }
