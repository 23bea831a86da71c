"""`DynamicSparseTraining`: sparse from the first step to the last, while connections move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_light.budgets import Budget
from lightning_light.criteria.evidence import Criterion
from lightning_light.criteria.random import Random
from lightning_light.errors import UnsupportedError
from lightning_light.progress import progress_at_step, steps_done, steps_planned
from lightning_light.schedules import Linear, Window
from lightning_light.sparsity.checks import check_counts, require_sparsity
from lightning_light.sparsity.gather import score_weights
from lightning_light.sparsity.growth import Connections, DynamicMethod, RigL, SRigL, Static
from lightning_light.sparsity.mask_enforcer import stepping
from lightning_light.sparsity.masking import MaskingCallback
from lightning_light.sparsity.patterns import Unstructured
from lightning_light.sparsity.plan import plan_masks
from lightning_light.sparsity.scope import Scope, check_scope
from lightning_light.sparsity.weights import Weight
from lightning_light.surgery.distributed import reduce_mean
from lightning_light.targets import Targets

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import nn
    from torch.optim import Optimizer

__all__ = ["DynamicSparseTraining"]

_SAME = 1e-9


class DynamicSparseTraining(MaskingCallback):
    """Train a network that is sparse all along: connections are dropped where they are weak and grown elsewhere.

    Their number never changes, so neither does the budget. A grown connection starts at zero, and so does its
    optimizer state. The dense network is never trained; its weights take the place they always took.

    Evci et al., 2020, "Rigging the Lottery: Making All Tickets Winners". https://arxiv.org/abs/1911.11134

    Example:
        >>> from lightning_light.budgets import Sparsity
        >>> DynamicSparseTraining(Sparsity(0.9), method=SRigL())
        DynamicSparseTraining(budget=Sparsity(amount=0.9), method=SRigL(fraction=0.3, min_salient=0.3))

    Args:
        budget: ``Sparsity(amount)`` of the targets' weights, from the first step on.
        method: `RigL`, `SRigL`, `SET`, or `Static` for the baseline in which nothing moves.
        criterion: chooses the first connections, by the weights alone: at random, or ``Magnitude()`` for a network
            that has been trained before.
        scope: how they are divided among the layers: ``"erk"``, more of small layers; ``"local"``, the same of each;
            ``"global"`` or ``"lamp"``, as the criterion says.
        targets: layers whose weights are sparse: patterns or `Targets`.
        every_n_steps: optimizer steps between two updates.
        start: when the network becomes sparse: an int is an epoch, a float a fraction of the run.
        end: when the last connection moves, likewise.
        seed: of what is drawn.

    Raises:
        ValueError: an argument out of range; said at once.
        TypeError: ``budget`` is no `Sparsity`, or ``method`` no method.
        TargetError: ``targets`` name nothing.
        OrderError: another callback masks one of the weights.
        UnsupportedError: a strategy that shards parameters; a frozen layer, in which nothing can grow.
    """

    method: ClassVar[str] = "dynamic_sparse_training"

    def __init__(
        self,
        budget: Budget,
        *,
        method: DynamicMethod = RigL(),
        criterion: Criterion = Random(),
        scope: Scope = "erk",
        targets: Targets | str | list[str] | None = None,
        every_n_steps: int = 100,
        start: int | float = 0.0,
        end: int | float = 0.75,
        seed: int = 0,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        require_sparsity(name, budget)
        check_scope(name, scope)
        check_counts(name, every_n_steps=every_n_steps)
        if not isinstance(method, DynamicMethod):
            raise TypeError(f"`{name}(method={method!r})`: expected `RigL()`, `SRigL()`, `SET()` or `Static()`.")
        if criterion.needs - {"generator"}:
            raise ValueError(
                f"`{name}(criterion={criterion!r})`: expected one that reads weights alone, found one that needs "
                f"{sorted(criterion.needs)}: the first connections are chosen before training. Use `Random()`."
            )
        Window(Linear(), start=start, end=end)  # says what is wrong with them
        self.budget = budget
        self.method = method  # type: ignore[misc, assignment]  # the argument of this name; the key is the class's
        self.criterion = criterion
        self.scope: Scope = scope
        self.targets = targets
        self.every_n_steps = every_n_steps
        self.start = start
        self.end = end
        self.seed = seed
        self._moves: DynamicMethod = method
        self._span = (0.0, 1.0)

    # Lightning's hooks, in the order a run meets them.

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Resolve the window, so that what cannot work is said before anything is trained."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._span = self._resolved(trainer.max_epochs)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask anew whether the last connection has moved: data that has become longer sets progress back."""
        self._finished = False

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Become sparse, or move connections, if that is due: between two steps."""
        state = self._hold(pl_module)
        if not state["masks"]:
            if progress_at_step(trainer) >= self._span[0]:
                self._begin(trainer, pl_module)
        elif "last" not in state:  # the masks of an earlier fit
            self._start_from(trainer, pl_module)
        elif self._is_due(trainer, state["last"], steps_done(trainer)) and self._is_ready(state):
            self._move(trainer, pl_module)

    @override
    def window(self, max_epochs: int | None) -> tuple[float, float] | None:
        """From when the network is sparse to when the last connection moves."""
        return self._resolved(max_epochs)

    # Private: the small questions the hooks ask.

    def _resolved(self, max_epochs: int | None) -> tuple[float, float]:
        window = Window(Linear(), start=self.start, end=self.end).resolved(max_epochs)
        return float(window.start), float(window.end)

    @override
    def _gather(self, trainer: Trainer, state: dict[str, Any], optimizer: Optimizer) -> None:
        next_step = steps_done(trainer) + 1
        if self._moves.needs_gradient and "last" in state and self._is_due(trainer, state["last"], next_step):
            _keep_gradients(state.setdefault("dense", {}), self._weights, stepping(optimizer))

    @override
    def _check_weights(self, pl_module: LightningModule) -> None:
        frozen = [weight.layer for weight in self._weights if not weight.parameter.requires_grad]
        if frozen and not isinstance(self._moves, Static):
            raise UnsupportedError(
                f"`{type(self).__name__}(method={self._moves!r})`: expected weights that learn, found frozen ones, "
                f"which have no gradient to grow by, in {frozen[:3]}. Exclude them: "
                f"`targets=Targets(exclude={frozen})`."
            )

    @override
    def _why_nothing(self, trainer: Trainer, pl_module: LightningModule) -> str | None:
        masks = self.state(pl_module)["masks"]
        if not masks:
            return f"the run ended before `start={self.start}`."
        if all(bool(mask.all()) for mask in masks.values()):
            return f"`{self.budget!r}` asks for less than one weight of {len(masks)} layers."
        missed = self._missed(self.state(pl_module))
        if self._moves.needs_gradient and missed and not self.state(pl_module).get("updates"):
            return f"no connection moved: no gradient reached {missed[:3]}. Exclude these layers from `targets`."
        return None

    def _missed(self, state: Mapping[str, Any]) -> list[str]:
        """Layers without a gradient, where some have one."""
        dense = state.get("dense", {})
        return [weight.layer for weight in self._weights if weight.name not in dense] if dense else []

    def _is_due(self, trainer: Trainer, last: int, step: int) -> bool:
        if self._finished or step - last < self.every_n_steps or isinstance(self._moves, Static):
            return False
        ahead = step - steps_done(trainer)
        if progress_at_step(trainer, ahead) > self._span[1] + _SAME:
            self._finished = ahead == 0
            return False
        return step < steps_planned(trainer)

    def _is_ready(self, state: Mapping[str, Any]) -> bool:
        return not self._moves.needs_gradient or ("dense" in state and not self._missed(state))

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first masks: how many by the scope, which by the criterion."""
        scores = score_weights(
            self._weights,
            self.criterion,
            sums={},
            steps=0,
            movement={},
            values={},
            generator=torch.Generator().manual_seed(self.seed),
            reduce=lambda tensor: tensor,
        )
        amount = self.budget.goal(0.0)
        masks = plan_masks(
            self._weights,
            scores,
            pattern=Unstructured(),
            scope=self.scope,
            amount=amount,
            share=1.0,
            amounts={},
            current={},
        )
        if isinstance(self._moves, SRigL):
            masks = {
                weight.name: weight.facing(
                    self._moves.start(weight.facing(scores[weight.name]), int(masks[weight.name].sum()))
                ).contiguous()
                for weight in self._weights
            }
        churn = self._change(trainer, pl_module, masks)
        self._start_from(trainer, pl_module)
        self._announce(trainer, pl_module, churn, restart=True)

    def _start_from(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = self.state(pl_module)
        state["last"] = steps_done(trainer)
        state["connections"] = {name: int(mask.sum()) for name, mask in state["masks"].items()}

    def _move(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One update: drop and grow in every layer."""
        state = self.state(pl_module)
        start, end = self._span
        fraction = self._moves.fraction_at(min(max((progress_at_step(trainer) - start) / (end - start), 0.0), 1.0))
        updates = state.get("updates", 0)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + updates + 1)
        masks = {}
        for weight in self._weights:
            gradient = state.get("dense", {}).get(weight.name)
            if gradient is not None:
                gradient = weight.facing(reduce_mean(trainer, gradient.to(weight.parameter.device)))
            mask = state["masks"][weight.name].to(weight.parameter.device)
            first = state["connections"].get(weight.name, int(mask.sum()))
            now = Connections(weight.facing(weight.parameter.detach()), weight.facing(mask), gradient, first, generator)
            masks[weight.name] = weight.facing(self._moves.move(now, fraction)).contiguous()
        churn = self._change(trainer, pl_module, masks)
        state |= {"last": steps_done(trainer), "updates": updates + 1}
        state.pop("dense", None)
        self._announce(trainer, pl_module, churn, restart=False)


def _keep_gradients(dense: dict[str, Tensor], weights: list[Weight], own: set[nn.Parameter]) -> None:
    """Those of one optimizer; not where a scaled backward pass has overflowed."""
    for weight in weights:
        gradient = weight.parameter.grad
        if weight.parameter in own and gradient is not None and bool(gradient.isfinite().all()):
            dense[weight.name] = gradient.detach().float().clone()
