"""`WeightPruning`: weights become zero while the network trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_light.budgets import Budget
from lightning_light.criteria.evidence import Criterion
from lightning_light.criteria.magnitude import Magnitude
from lightning_light.criteria.movement import Movement
from lightning_light.progress import progress_at_step, steps_done
from lightning_light.schedules import Cubic, Schedule, Window, resolve
from lightning_light.sparsity import rewind
from lightning_light.sparsity.checks import check_pruning
from lightning_light.sparsity.gather import InputWatch, add_gradients, add_movement, check_evidence, score_weights
from lightning_light.sparsity.mask_enforcer import mask_model, stepping
from lightning_light.sparsity.mask_schedules import Rewinding, act_window
from lightning_light.sparsity.masking import MaskingCallback
from lightning_light.sparsity.patterns import NM, Pattern, Unstructured
from lightning_light.sparsity.plan import check_pattern, plan_masks
from lightning_light.sparsity.scope import Scope
from lightning_light.sparsity.sr_ste import StraightThrough
from lightning_light.surgery.averaged_models import averaged_models_of
from lightning_light.surgery.distributed import reduce_mean
from lightning_light.targets import Targets, as_targets

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

__all__ = ["WeightPruning"]

_SAME = 1e-9


class WeightPruning(MaskingCallback):
    """Set the least important weights to zero, step by step, and keep them there.

    Shapes stay. The masks live in the compression state, so the module's ``state_dict`` keeps its keys.
    A masked weight, its gradient and its optimizer state are exactly zero after every step. Zeros alone make nothing
    smaller or faster: see `measure_sparsity` for what they are worth.

    Zhu & Gupta, 2017, "To prune, or not to prune: exploring the efficacy of pruning for model compression".
    https://arxiv.org/abs/1710.01878

    Example:
        >>> from lightning_light.budgets import Sparsity
        >>> WeightPruning(Sparsity(0.9), scope="erk")
        WeightPruning(budget=Sparsity(amount=0.9), scope='erk')
        >>> WeightPruning(pattern=NM(2, 4))
        WeightPruning(pattern=NM(n=2, m=4))

    Args:
        budget: ``Sparsity(amount)`` of the targets' weights. None for `NM`, which brings its own, or with ``amounts``.
        criterion: scores weights; the lowest go first.
        schedule: progress -> share of the way to the budget. Where it falls, masks are lifted: `Alternating`,
            `DenseSparseDense`; `Rewinding` sets weights back.
        pattern: what becomes zero together: `Unstructured`, `NM`, `Block`, `Filter`, `Kernel`, `Row`, `Column`.
        scope: ``"global"``, the lowest of all; ``"local"``, the same amount of each; ``"erk"``, more of larger layers;
            ``"lamp"``, global after scaling each layer's scores.
        targets: layers whose weights may become zero: patterns or `Targets`.
        amounts: layer pattern -> its own share of zeros, in [0, 1).
        every_n_steps: optimizer steps between two changes of the masks, at least.
        calibration_batches: optimizer steps before a change over which a data-dependent criterion gathers.
        sr_ste: decay of masked weights in SR-STE training, for `NM`; None for none. The paper has ``2e-4``.
        seed: for criteria that draw.

    Raises:
        ValueError: an argument out of range; said at once.
        TypeError: ``budget`` is no `Sparsity`.
        TargetError: ``targets`` name nothing, or a layer that the pattern does not divide.
        BudgetError: a layer would lose every weight.
        OrderError: another callback masks one of the weights.
        UnsupportedError: a strategy that shards parameters; evidence that a layer cannot give.
    """

    method: ClassVar[str] = "weight_pruning"

    def __init__(
        self,
        budget: Budget | None = None,
        *,
        criterion: Criterion = Magnitude(),
        schedule: Schedule = Window(Cubic(), start=0.1, end=0.7),
        pattern: Pattern = Unstructured(),
        scope: Scope = "global",
        targets: Targets | str | list[str] | None = None,
        amounts: dict[str, float] | None = None,
        every_n_steps: int = 20,
        calibration_batches: int = 8,
        sr_ste: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_pruning(
            budget,
            pattern,
            scope,
            amounts,
            sr_ste,
            schedule,
            every_n_steps=every_n_steps,
            calibration_batches=calibration_batches,
        )
        self.budget = budget
        self.criterion = criterion
        self.schedule = schedule
        self.pattern = pattern
        self.scope: Scope = scope
        self.targets = targets
        self.amounts = amounts
        self.every_n_steps = every_n_steps
        self.calibration_batches = calibration_batches
        self.sr_ste = sr_ste
        self.seed = seed
        self._resolved: Schedule = schedule
        self._own: dict[str, float] = {}
        self._watch: InputWatch | None = None
        self._through: StraightThrough | None = None
        self._last_change = 1.0
        self._needs_data = bool(criterion.needs - {"generator", "movement"})

    # Lightning's hooks, in the order a run meets them.

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Resolve the schedule, so that what cannot work is said before anything is trained."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._resolved = resolve(self.schedule, trainer.max_epochs)
            window = act_window(self.schedule, trainer.max_epochs)
            rewind.check(self.schedule, window)
            self._last_change = window[1] if window is not None else 0.0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the layers as they are now; start what gathers."""
        super().on_fit_start(trainer, pl_module)
        if "inputs" in self.criterion.needs:
            self._watch = InputWatch(self._weights)
        if self.sr_ste is not None:
            assert isinstance(self.pattern, NM)  # as `check_pruning` has seen
            self._through = StraightThrough(self.pattern, self.sr_ste)
            self._through.watch(trainer.optimizers)
            self._enforcer.active = False
            self._train_through(pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Change the masks, if that is due: before the batch, and so before its metrics."""
        state = self._hold(pl_module)
        if isinstance(self.schedule, Rewinding) and "origin" not in state and not state.get("events"):
            self._remember(trainer, pl_module, self.schedule.to)
        if self._watch is not None:
            self._watch.active = self._is_gathering(trainer, state)
        if self._is_due(trainer, state) and self._is_ready(state):
            self._prune(trainer, pl_module)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Gather and mask; where dense weights are trained, let them meet the optimizer."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._through is not None:
            self._through.before_step(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count what was gathered."""
        if self._needs_data:
            self._count(trainer, self.state(pl_module))
        if self._through is not None:
            self._through.settle()
            self._mask_copies(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An average may be put in the place of the network now: mask it first."""
        if self._through is not None:
            self._mask_copies(trainer, pl_module)
        super().on_train_end(trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        if self._watch is not None:
            self._watch.remove()
        if self._through is not None:
            self._through.release()
        self._watch, self._through, self._own = None, None, {}
        super().teardown(trainer, pl_module, stage)

    @override
    def window(self, max_epochs: int | None) -> tuple[float, float] | None:
        """From the first change of the masks to the last."""
        found = act_window(self.schedule, max_epochs)
        return None if found is None else (found[0], 1.0 if self.sr_ste is not None else found[1])

    # Private: the small questions the hooks ask.

    @override
    def _gather(self, trainer: Trainer, state: dict[str, Any], optimizer: Optimizer) -> None:
        if isinstance(self.criterion, Movement) and state.get("share", 0.0) < 1.0:
            add_movement(state.setdefault("movement", {}), self._weights, self.criterion, stepping(optimizer))
        if self._is_gathering(trainer, state):
            add_gradients(state.setdefault("gathered", {}), self._weights, self.criterion, stepping(optimizer))

    def _count(self, trainer: Trainer, state: dict[str, Any]) -> None:
        """One more step was gathered, if it was."""
        if self._watch is not None and self._watch.active:
            self._watch.move_to(state.setdefault("gathered", {}), lambda tensor: reduce_mean(trainer, tensor))
        if self._is_gathering(trainer, state):
            state["seen"] = state.get("seen", 0) + 1

    @override
    def _check_weights(self, pl_module: LightningModule) -> None:
        check_pattern(type(self).__name__, self._weights, self.pattern)
        check_evidence(type(self).__name__, self.criterion, self._weights)
        self._own = {}
        for pattern, amount in (self.amounts or {}).items():
            layers = as_targets(pattern).select(pl_module)
            self._own |= {weight.name: amount for weight in self._weights if weight.layer in layers}

    @override
    def _why_nothing(self, trainer: Trainer, pl_module: LightningModule) -> str | None:
        state = self.state(pl_module)
        if state.get("most", 0) or any(not bool(mask.all()) for mask in state["masks"].values()):
            return None
        if state.get("events", 0):
            return f"`{self.budget!r}` asks for less than one weight of {len(self._weights)} layers."
        return f"the run ended before a change of the masks was due; `schedule={self.schedule!r}`."

    @override
    def _cut_along(self, state: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
        state.get("gathered", {}).pop("inputs", None)
        gathered = [(state["gathered"], kind) for kind in state.get("gathered", {})]
        return [*super()._cut_along(state), *gathered]

    @override
    def on_surgery(
        self, trainer: Trainer, pl_module: LightningModule, kept: Mapping[str, Mapping[int, Tensor]] | None
    ) -> None:
        """The masks follow, and so do the dense weights behind them."""
        super().on_surgery(trainer, pl_module, kept)
        self._check_weights(pl_module)
        self._train_through(pl_module)

    def _remember(self, trainer: Trainer, pl_module: LightningModule, moment: float) -> None:
        """Keep the weights to rewind to, when their moment has come."""
        if progress_at_step(trainer) + _SAME >= moment:
            self.state(pl_module)["origin"] = rewind.remember(pl_module)

    def _is_due(self, trainer: Trainer, state: dict[str, Any], ahead: int = 0) -> bool:
        """Whether the schedule has moved on; ``every_n_steps`` lie between two changes, but for its end."""
        if self._finished:
            return False
        progress = progress_at_step(trainer, ahead)
        share, before = self._resolved(progress), state.get("share", 0.0)
        if abs(share - before) <= _SAME:
            self._finished = ahead == 0 and progress > self._last_change
            return False
        rested = steps_done(trainer) + ahead - state.get("last", -self.every_n_steps) >= self.every_n_steps
        return rested or share < before or share >= self._resolved(1.0) - _SAME

    def _is_ready(self, state: dict[str, Any]) -> bool:
        if "movement" in self.criterion.needs and "movement" not in state:
            return False
        return not self._needs_data or state.get("seen", 0) >= self.calibration_batches

    def _is_gathering(self, trainer: Trainer, state: dict[str, Any]) -> bool:
        """Whether the masks change in at most ``calibration_batches`` steps, or would, had enough been gathered."""
        return self._needs_data and self._is_due(trainer, state, ahead=self.calibration_batches)

    def _prune(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One event: score, plan for all weights together, mask."""
        state, share = self.state(pl_module), self._resolved(progress_at_step(trainer))
        falling = share < state.get("share", 0.0) - _SAME
        masks = self._plan(trainer, pl_module, share, {} if falling else state["masks"]) if share > 0.0 else {}
        if not masks:  # lifted: what was masked starts at zero
            masks = {weight.name: torch.ones_like(weight.parameter, dtype=torch.bool) for weight in self._weights}
        if self.sr_ste is not None and "shadow" not in state:
            state["shadow"] = {weight.name: weight.parameter.detach().clone() for weight in self._weights}
        churn = self._change(trainer, pl_module, masks)
        state |= {"share": share, "last": steps_done(trainer), "events": state.get("events", 0) + 1, "seen": 0}
        state["most"] = max(state.get("most", 0), sum(int((~mask).sum()) for mask in state["masks"].values()))
        state.pop("gathered", None)
        if share == 0.0:
            state["masks"] = {}
            self._hold(pl_module)
        if "origin" in state and churn > 0.0:
            rewind.restore(pl_module, state["origin"], state["masks"], trainer.optimizers)
        self._train_through(pl_module)
        self._announce(trainer, pl_module, churn, restart=churn > 0.0)

    def _plan(
        self, trainer: Trainer, pl_module: LightningModule, share: float, current: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        state = self.state(pl_module)
        scores = score_weights(
            self._weights,
            self.criterion,
            sums=state.get("gathered", {}),
            steps=state.get("seen", 0),
            movement=state.get("movement", {}),
            values=state.get("shadow", {}),
            reduce=lambda tensor: reduce_mean(trainer, tensor),
            generator=torch.Generator().manual_seed(self.seed * 1_000_003 + state.get("events", 0)),
        )
        return plan_masks(
            self._weights,
            scores,
            pattern=self.pattern,
            scope=self.scope,
            share=share,
            amount=0.0 if self.budget is None else self.budget.at(0.0, share),
            amounts={name: share * amount for name, amount in self._own.items()},
            current={} if self._through is not None else current,
        )

    def _train_through(self, pl_module: LightningModule) -> None:
        state = self.state(pl_module)
        if self._through is None or "shadow" not in state:
            return
        assert isinstance(self.pattern, NM)  # as `check_pruning` has seen
        for key in ("shadow", "masks"):
            for weight in self._weights:
                if state[key][weight.name].device != weight.parameter.device:
                    state[key][weight.name] = state[key][weight.name].to(weight.parameter.device)
        self._through.hold(self._weights, state["masks"], state["shadow"], self.pattern.kept_of(state["share"]))

    def _mask_copies(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for model in averaged_models_of(trainer, pl_module):
            mask_model(model, self.state(pl_module)["masks"])
