"""`LowRankFactorization`: layers become factors while the network trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_light.budgets import Budget
from lightning_light.callback import CompressionCallback
from lightning_light.errors import LightningLightError
from lightning_light.events import points_done
from lightning_light.example_input import Capture, ExampleInput
from lightning_light.lowrank.apply import apply_factors
from lightning_light.lowrank.build import factor_form
from lightning_light.lowrank.checks import check_arguments, check_moments, moments
from lightning_light.lowrank.costs import LayerTimer, OutputProbe, quantity
from lightning_light.lowrank.evidence import (
    InputWatch,
    Sums,
    add_gradients,
    calibration_calls,
    from_batches,
    mean_evidence,
)
from lightning_light.lowrank.fits import Fit, WeightSVD
from lightning_light.lowrank.layers import Layer, find_layers
from lightning_light.lowrank.plan import Form, Options, Plan, plan_factors
from lightning_light.lowrank.ranks import RankRule
from lightning_light.lowrank.regularize import RankPenalty, add_rank_penalty
from lightning_light.order import Stage
from lightning_light.progress import steps_done, steps_planned, training_progress
from lightning_light.schedules import Linear, Schedule
from lightning_light.surgery.averaged_models import averaged_models_of
from lightning_light.surgery.distributed import broadcast, log_rank_zero, reduce_mean
from lightning_light.surgery.stored_example import remember, restore_or_capture_example
from lightning_light.targets import Targets, as_targets

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

__all__ = ["LowRankFactorization"]


class LowRankFactorization(CompressionCallback):
    """Replace layers by two or three smaller ones, with ranks that fit ``budget``, and go on training.

    Only what gets smaller and cheaper is replaced; the log says which layers, how, and why the others stayed. What
    replaces a layer is an ``nn.Sequential`` of ``torch.nn`` layers. The optimizer owns every new weight, at the same
    place of the same group.

    Linear layers: singular value decomposition. Convolutions: ``"channel"``, kxk then 1x1 (Zhang et al., 2016,
    https://arxiv.org/abs/1505.06798); ``"spatial"``, kx1 then 1xk (Jaderberg et al., 2014,
    https://arxiv.org/abs/1405.3866, in the closed form of Tai et al., 2016, https://arxiv.org/abs/1511.06067);
    ``"tucker2"``, 1x1, kxk, 1x1 (Kim et al., 2016, https://arxiv.org/abs/1511.06530).

    Example:
        >>> from lightning_light.budgets import MACs
        >>> LowRankFactorization(MACs(0.5), start=0.3, round_to=4)
        LowRankFactorization(budget=MACs(remaining=0.5), start=0.3, round_to=4)

    Args:
        budget: what the network is to reach: ``MACs``, ``Params``, ``Size`` or ``Latency`` (of the layers on the
            training device). Ranks are then chosen over all layers at once.
        start: when; an int is an epoch, a float a fraction of the run. 1.0 is before the last batch.
        end: with it, ranks go down in steps from ``start`` to ``end``, each time chosen anew from what training has
            made of the factors.
        schedule: progress between ``start`` and ``end`` -> share of the way to the budget.
        events: how many steps a gradual course has.
        ranks: a rule for the ranks of each layer in place of a budget: ``EnergyKept``, ``RankRatio``, ``EVBMF``,
            ``OutputChange``.
        fit: which low-rank matrix is the nearest: ``WeightSVD``, ``WhitenedSVD``, ``ActivationSVD``, ``FisherSVD``.
            With data, convolutions take the ``"channel"`` form.
        form: of convolutions; ``"auto"`` takes what loses least for the cost, layer by layer.
        targets: layers that may be replaced: patterns or `Targets`.
        blocks: pattern of a fused linear layer, or of a `torch.nn.MultiheadAttention` -> how many equal parts it, or
            each of its projections, consists of, each of which gets ranks of its own: ``{"*.qkv": 3}``, or
            ``{"*.attention": heads}`` for ranks per head. Without a mention, an attention has its four projections.
        round_to: ranks are multiples of it.
        min_rank: what every layer keeps at least.
        faster_only: leave a layer alone if its factors, timed on this machine, do not run faster.
        importance: what an error counts, under a budget: ``"equal"``, as a share of the layer's own energy, or
            ``"output"``, by how much the network's output changes on ``calibration``.
        calibration: batches to measure on, in place of those that training draws. Of a tuple the first item is the
            network's input; a mapping is its keyword arguments.
        calibration_batches: how many batches a fit with data sees.
        penalty: `NuclearNorm` or `Orthogonality`, on the weights of the layers until the first event.
        dry_run: log what would be done, and do nothing.

    Raises:
        ValueError: an argument out of range; said at once.
        BudgetError: the budget cannot be reached; said before anything changes.
        TargetError: ``targets`` name nothing.
        UnsupportedError: a strategy, launcher or optimizer that cannot follow.
    """

    method: ClassVar[str] = "low_rank"
    stage: ClassVar[int] = Stage.FACTORS

    def __init__(
        self,
        budget: Budget | None = None,
        *,
        start: int | float = 0.0,
        end: int | float | None = None,
        schedule: Schedule = Linear(),
        events: int = 5,
        ranks: RankRule | None = None,
        fit: Fit = WeightSVD(),
        form: Form = "auto",
        targets: Targets | str | list[str] | None = None,
        blocks: dict[str, int] | None = None,
        round_to: int = 8,
        min_rank: int = 1,
        faster_only: bool = False,
        importance: Literal["equal", "output"] = "equal",
        calibration: Iterable[Any] | None = None,
        calibration_batches: int = 16,
        penalty: RankPenalty | None = None,
        dry_run: bool = False,
    ) -> None:
        check_arguments(
            budget,
            ranks,
            form=form,
            importance=importance,
            calibrated=calibration is not None,
            round_to=round_to,
            min_rank=min_rank,
            events=events,
            calibration_batches=calibration_batches,
        )
        check_moments(ranks, start, end, schedule)
        self.budget = budget
        self.start = start
        self.end = end
        self.schedule = schedule
        self.events = events
        self.ranks = ranks
        self.fit = fit
        self.form: Form = form
        self.targets = targets
        self.blocks = blocks
        self.round_to = round_to
        self.min_rank = min_rank
        self.faster_only = faster_only
        self.importance: Literal["equal", "output"] = importance
        self.calibration = calibration
        self.calibration_batches = calibration_batches
        self.penalty = penalty
        self.dry_run = dry_run
        self._points: list[tuple[float, float]] = []
        self._capture: Capture | None = None
        self._watch: InputWatch | None = None
        self._watched: list[Layer] = []
        self._last_plan: Plan | None = None

    # Lightning's hooks, in the order a run meets them.

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Resolve epochs, so that what cannot work is said before anything is trained."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._points = self._moments(trainer.max_epochs)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for an example of a call; name the targets as the layers are now."""
        super().on_fit_start(trainer, pl_module)
        state = self.state(pl_module)
        if not self.resumed(pl_module):  # a second run keeps the dense network's budget, and does not do it twice
            for key in ("events", "seen", "gathered", "share"):
                state.pop(key, None)
        if "names" not in state:
            state["names"] = list(as_targets(self.targets).select(pl_module))
        self._last_plan = None
        self._capture = restore_or_capture_example(pl_module, state)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Factor, if it is time: before the batch, so that no checkpoint pairs new weights with an old metric."""
        state = self.state(pl_module)
        due = points_done(self._points, training_progress(trainer), steps_planned(trainer))
        if due > state.get("events", 0) and self._is_ready(pl_module):
            self._factor(trainer, pl_module, due)
        if self._is_gathering(trainer, pl_module):
            self._open_watch(pl_module)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Gather squared gradients as they are here, accumulated and unscaled; then add the penalty to them."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self._watch is not None and self._watch.is_open and "grad_squared" in self.fit.needs:
            add_gradients(self.state(pl_module).setdefault("gathered", {}), pl_module, self._watched, parameters)
        if self.penalty is not None and not self.state(pl_module).get("events", 0):
            add_rank_penalty(self.penalty, self._penalized(pl_module), parameters)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Put what was gathered where checkpoints find it, and the call that was seen."""
        remember(self.state(pl_module), self._capture)
        if self._watch is not None and self._watch.is_open:
            self._watch.is_open = False
            state = self.state(pl_module)
            _move(self._watch.sums, state.setdefault("gathered", {}), lambda tensor: reduce_mean(trainer, tensor))
            state["seen"] = state.get("seen", 0) + 1

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so, if nothing was factored."""
        nothing = not self.state(pl_module).get("layers") and not self.dry_run
        if nothing and not getattr(trainer, "fast_dev_run", False):
            self._no_effect(self._why_nothing())

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        for held in (self._capture, self._watch):
            if held is not None:
                held.remove()
        self._capture, self._watch, self._watched = None, None, []
        super().teardown(trainer, pl_module, stage)

    @override
    def window(self, max_epochs: int | None) -> tuple[float, float] | None:
        """From the first event to the last."""
        points = self._moments(max_epochs)
        return (points[0][0], points[-1][0]) if points else None

    # For functions that do the same without a Trainer.

    def plan(
        self,
        model: nn.Module,
        layers: list[Layer],
        reasons: Mapping[str, str],
        *,
        now: float,
        limit: float,
        evidence: Mapping[str, Any],
        calls: list[ExampleInput],
    ) -> Plan:
        """`plan_factors` with these arguments, and with the instruments that measure on ``model``."""
        by_output = self.importance == "output"
        probing = by_output or (self.ranks is not None and self.ranks.measures)
        weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        return plan_factors(
            layers,
            reasons,
            Options(self.fit, self.ranks, self.round_to, self.min_rank, self.faster_only),
            budget=self.budget,
            now=now,
            limit=limit,
            evidence=evidence,
            timer=LayerTimer(model),
            probe=OutputProbe(model, calls) if probing else None,
            by_output=by_output,
            bytes_each=weight.element_size(),
        )

    # Private: the small questions the hooks ask.

    def _moments(self, max_epochs: int | None) -> list[tuple[float, float]]:
        return moments(self.start, self.end, self.schedule, self.events, max_epochs)

    @property
    def _gathers(self) -> bool:
        """Whether the fit's data come from the batches of training."""
        return bool(self.fit.needs) and (self.calibration is None or "grad_squared" in self.fit.needs)

    def _is_ready(self, pl_module: LightningModule) -> bool:
        if self._capture is None or self._capture.example is None:
            return False
        seen: int = self.state(pl_module).get("seen", 0)
        return not self._gathers or seen >= self.calibration_batches

    def _is_gathering(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether the next event is at most ``calibration_batches`` steps away."""
        done: int = self.state(pl_module).get("events", 0)
        if not self._gathers or done >= len(self._points) or self._capture is None or self._capture.example is None:
            return False
        progress, _ = self._points[done]
        return steps_done(trainer) + self.calibration_batches >= progress * steps_planned(trainer)

    def _open_watch(self, pl_module: LightningModule) -> None:
        if self._watch is None:
            self._watched, _ = self._layers(pl_module)
            self._watch = InputWatch(pl_module, self._watched, self.fit.needs)
        self._watch.is_open = True

    def _layers(self, pl_module: LightningModule) -> tuple[list[Layer], dict[str, str]]:
        state = self.state(pl_module)
        done = state.get("layers", {})
        names = dict.fromkeys([*state["names"], *done])
        mine = done if self.budget is not None else ()  # a rule has one answer, and has given it
        return find_layers(
            pl_module, self._example(pl_module), names, form=self.form, blocks=self.blocks or {}, mine=mine
        )

    def _example(self, pl_module: LightningModule) -> ExampleInput:
        assert self._capture is not None
        assert self._capture.example is not None  # `_is_ready`
        return self._capture.example.to(pl_module)

    def _penalized(self, pl_module: LightningModule) -> list[nn.Module]:
        modules = (pl_module.get_submodule(name) for name in self.state(pl_module)["names"])
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        return [module for module in modules if isinstance(module, kinds) and factor_form(module) is None]

    def _factor(self, trainer: Trainer, pl_module: LightningModule, due: int) -> None:
        """One event: decide on rank 0, replace everywhere, let everything follow."""
        share = self._points[due - 1][1]
        plan = self._decide(trainer, pl_module, share)
        self._last_plan = plan
        state = self.state(pl_module)
        if self.dry_run:
            log_rank_zero(trainer, "\n  ".join([f"{self.method}: dry run, nothing is replaced", *plan.lines()]))
        elif plan.layers:
            averaged_models = averaged_models_of(trainer, pl_module)
            entry = apply_factors(pl_module, plan, optimizers=trainer.optimizers, averaged_models=averaged_models)
            self._after_surgery(trainer, pl_module, entry, self._summary(plan))
            state["layers"] = {**state.get("layers", {}), **_facts(plan)}
        state |= {"events": due, "seen": 0, "share": share}
        state.pop("gathered", None)
        if self._watch is not None:
            self._watch.remove()
            self._watch = None
        self._log(trainer, pl_module, plan, share)

    def _decide(self, trainer: Trainer, pl_module: LightningModule, share: float) -> Plan:
        """The plan of rank 0, with its factors, on every rank; so is its refusal."""
        state = self.state(pl_module)
        evidence = mean_evidence(state.get("gathered", {}))
        outcome: Plan | LightningLightError | None = None
        if trainer.is_global_zero:
            now = quantity(pl_module, self.budget, self._example(pl_module))
            state.setdefault("dense", now)
            limit = 0.0 if self.budget is None else self.budget.at(state["dense"], share)
            try:
                outcome = self._plan(pl_module, now, limit, evidence)
            except LightningLightError as error:
                outcome = error
        state["dense"] = broadcast(trainer, state.get("dense", 0.0))
        outcome = broadcast(trainer, outcome)
        if isinstance(outcome, LightningLightError):
            raise outcome
        assert outcome is not None  # rank 0 has one
        return outcome

    def _plan(self, pl_module: LightningModule, now: float, limit: float, evidence: Mapping[str, Any]) -> Plan:
        layers, reasons = self._layers(pl_module)
        calls = calibration_calls(pl_module, self.calibration, self.calibration_batches)
        if self.fit.needs and not self._gathers:
            evidence = from_batches(pl_module, layers, self.fit.needs, calls)
        return self.plan(pl_module, layers, reasons, now=now, limit=limit, evidence=evidence, calls=calls)

    def _summary(self, plan: Plan) -> str:
        lines = "\n  ".join(plan.lines())
        return f"{len(plan.layers)} layers factored, {plan.quantity} {plan.before:.6g} -> {plan.after:.6g}\n  {lines}"

    def _log(self, trainer: Trainer, pl_module: LightningModule, plan: Plan, share: float) -> None:
        scalars = {f"{self.method}/share": share, f"{self.method}/{plan.quantity}": plan.after}
        for name, fact in self.state(pl_module).get("layers", {}).items():
            for key in ("rank", "energy_kept", "reconstruction_error"):
                scalars[f"{self.method}/{key}/{name}"] = fact[key]
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=steps_done(trainer))

    def _why_nothing(self) -> str:
        if self._last_plan is not None:
            reasons = "; ".join(f"{name}: {why}" for name, why in self._last_plan.skipped.items())
            return f"no layer was factored. {reasons}"
        if self._capture is None or self._capture.example is None:
            return (
                "the LightningModule was never called, so its input is not known. Set `example_input_array`, or call "
                "`self(...)` in `training_step`."
            )
        if self._gathers:
            return f"the run ended before {self.calibration_batches} batches had been seen; lower that."
        return f"the run ended before the event, due at {self._points[0][0]:.0%} of it."


def _facts(plan: Plan) -> dict[str, Any]:
    """What a checkpoint and a monitor may want to know, in plain types."""
    return {
        name: {
            "form": found.form,
            "ranks": list(found.ranks),
            "rank": float(max(found.ranks)),
            "full": list(found.full),
            "energy_kept": 1.0 - found.error,
            "reconstruction_error": max(found.error, 0.0) ** 0.5,
        }
        for name, found in plan.layers.items()
    }


def _move(source: Sums, target: Sums, reduce: Callable[[Tensor], Tensor]) -> None:
    """Add what this batch gave to what all ranks know, so that rank 0's checkpoint resumes every rank."""
    for name, entry in source.items():
        mine = target.setdefault(name, {})
        for kind, local in entry.items():
            value = reduce(local)
            mine[kind] = mine[kind].to(value.device) + value if kind in mine else value
    source.clear()
