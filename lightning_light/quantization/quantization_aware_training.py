"""`QuantizationAwareTraining`: the network learns to live with few bits, while it trains."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_light.callback import CompressionCallback
from lightning_light.example_input import Capture
from lightning_light.int8 import Int8Weights
from lightning_light.order import Stage
from lightning_light.progress import training_progress
from lightning_light.quantization.attachment import Attachment
from lightning_light.quantization.moments import check_moments, resolve_moment
from lightning_light.quantization.parameters import Learned, first_values
from lightning_light.quantization.plan import Plan
from lightning_light.quantization.recipes import Int8, Recipe
from lightning_light.quantization.rounding import merge
from lightning_light.quantization.rules import Grid
from lightning_light.quantization.state import attach_from, begin
from lightning_light.schedules import Schedule, resolve
from lightning_light.surgery.checkpoint_monitoring import reset_monitoring
from lightning_light.surgery.distributed import check_agreement, log_rank_zero, reduce_max, reduce_mean
from lightning_light.surgery.stored_example import remember, restore_or_capture_example

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["QuantizationAwareTraining"]


class QuantizationAwareTraining(CompressionCallback):
    """Train with the rounding of int8 kernels in every forward pass, in place.

    From ``start`` on ranges of the numbers are observed for ``observe_batches`` training batches; then weights and
    numbers are rounded as the engine will round them, in training and in evaluation, and gradients pass straight
    through. No module is replaced and no tensor of the module's ``state_dict`` is added or renamed: the operations
    are found by following one forward pass, and rounded as they are called. What is remembered is in the checkpoint's
    manifest. A module that `quantize` has rounded by the same recipe goes on from its ranges, if ``start`` is 0.0:
    nothing is observed first. When the run has ended, the module computes in float again; `fake_quantized` brings the
    rounding back.

    A batch norm after a layer is folded into it by the engine. It needs no other treatment in training: weights have
    one scale a channel, so rounding them before or after the fold is the same.

    Jacob et al., 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference".
    https://arxiv.org/abs/1712.05877

    Example:
        >>> from lightning_light.quantization import Int8, QuantizationAwareTraining
        >>> QuantizationAwareTraining(Int8(), start=0.7)
        QuantizationAwareTraining(start=0.7)

    Args:
        recipe: how many bits, and by which engine's rules.
        start: when observation begins; an int is an epoch, a float a fraction of the run. 0.0 for a trained network.
        observe_batches: training batches that are observed before anything is rounded.
        freeze_observers: from when on ranges stay as they are; 1.0 for never.
        freeze_batch_norm: from when on the batch norms that the engine folds use their running statistics and keep
            them; 1.0 for never, 0.0 for a short run with a network that is trained already.
        ladder: from eight bits to the recipe's by steps: share 0 is eight, share 1 the fewest bits of the recipe.
            ``Window(Staircase(Linear(), steps=2), end=0.6)`` goes 8, 6, 4 for a recipe of four bits. None: at once.

    Raises:
        ValueError: an argument out of range, moments out of order, or a second such callback in the Trainer.
        TypeError: ``recipe`` is no recipe, or ``ladder`` no schedule.
        TargetError: the recipe's ``keep_float`` names nothing.
        OrderError: another method changes the structure after ``start``.

    Note:
        Channels leave, weights become zero and layers are factored before ``start``: ranges belong to the network that
        is exported. Parts that ``torch.compile`` has compiled run uncompiled from ``start`` on.

        Lightning's averaging callbacks put their weights into the live module, to validate and in the end: it rounds
        them as its own. A ``copy.deepcopy`` or pickle of a module that rounds goes on rounding, with the ranges of that
        moment and for good; make copies before ``start`` or after the run, and round them in `fake_quantized`.
    """

    method: ClassVar[str] = "quantization_aware_training"
    stage: ClassVar[int] = Stage.QUANTIZATION
    structural: ClassVar[bool] = False

    def __init__(
        self,
        recipe: Recipe = Int8(),
        *,
        start: int | float = 0.0,
        observe_batches: int = 32,
        freeze_observers: int | float = 0.9,
        freeze_batch_norm: int | float = 0.95,
        ladder: Schedule | None = None,
    ) -> None:
        check_moments(
            recipe,
            observe_batches,
            ladder,
            start=start,
            freeze_observers=freeze_observers,
            freeze_batch_norm=freeze_batch_norm,
        )
        self.recipe = recipe
        self.start = start
        self.observe_batches = observe_batches
        self.freeze_observers = freeze_observers
        self.freeze_batch_norm = freeze_batch_norm
        self.ladder = ladder
        self._ladder: Schedule | None = None
        self._learned: Learned | None = None
        self._moments: dict[str, float] = {}
        self._capture: Capture | None = None
        self._attachment: Attachment | None = None

    # Lightning's hooks, in the order a run meets them.

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Resolve the moments, so that what cannot work is said before anything is trained."""
        super().setup(trainer, pl_module, stage)
        _refuse_several(trainer)
        if stage == "fit":
            self._moments = {
                name: resolve_moment(name, getattr(self, name), trainer.max_epochs)
                for name in ("start", "freeze_observers", "freeze_batch_norm")
            }
            self._ladder = None if self.ladder is None else resolve(self.ladder, trainer.max_epochs)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on where the checkpoint was, with what is learned in the optimizers before their state; or begin anew."""
        if self._learned is not None:
            self._learned.discard()  # of an earlier fit with the same optimizers
        self._learned = None
        state = self.state(pl_module)
        goes_on = self._goes_on_from_quantize(trainer, state)
        if not trainer._checkpoint_connector._loaded_checkpoint and not goes_on:
            state.clear()
        if state.get("form") == "rounded":
            self._learn(trainer, pl_module)
        super().on_fit_start(trainer, pl_module)
        state = self.state(pl_module)
        self.recipe.rules(pl_module, [])  # what its patterns name is there
        self._attach(pl_module, None if self._learned is None else self._learned.parameters)
        if "plan" not in state:
            self._capture = restore_or_capture_example(pl_module, state)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Round in ``trainer.validate`` too; within ``fit`` that is so already."""
        self._attach(pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Round in ``trainer.test`` too."""
        self._attach(pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Round in ``trainer.predict`` too."""
        self._attach(pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Enter the stage that is due: observe, round, keep the ranges, keep the statistics."""
        progress, state = training_progress(trainer), self.state(pl_module)
        if "plan" not in state and progress >= self._moments["start"]:
            self._begin(trainer, pl_module)
        if self._attachment is None:
            return
        self._descend(state, progress)
        if state["form"] == "plain" and state["batches"] >= self.observe_batches:
            self._begin_to_round(trainer, pl_module)
        rounded = state["form"] == "rounded"
        self._attachment.observing = not rounded or progress < self._moments["freeze_observers"]
        # In its last epoch `StochasticWeightAveraging` gathers statistics anew, and does not learn.
        self._attachment.batch_norm_frozen = progress >= self._moments[
            "freeze_batch_norm"
        ] and not _is_gathering_statistics(trainer)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """DDP does not know what is learned of the grids: take the mean of its gradients."""
        accumulating = pl_module.automatic_optimization and trainer.fit_loop._should_accumulate()
        if self._learned is not None and trainer.world_size > 1 and not accumulating:
            self._learned.reduce(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take what this batch has shown on all ranks into the ranges; validation is never observed."""
        state = self.state(pl_module)
        if "plan" not in state:
            remember(state, self._capture)
        if self._attachment is None:
            return
        if self._attachment.observing:
            self._attachment.observing = False
            seen = self._on_all_ranks(trainer, self._attachment.observed(pl_module.device))
            state["ranges"] = merge(state["ranges"].to(seen), seen, self._attachment.shares.to(seen))
            state["batches"] += 1
            state["learned"] |= self._attachment.first_steps if state["form"] == "plain" else {}
        elif not self._attachment.learned:
            return
        self._attachment.use(state["ranges"], state["at_least"])

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so, if nothing was rounded."""
        if self._attachment is not None:
            self._attachment.batch_norm_frozen = False
        state = self.state(pl_module)
        if state.get("form") != "rounded" and not getattr(trainer, "fast_dev_run", False):
            self._no_effect(self._why_nothing(state))

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind: `teardown` is not called then."""
        self._let_go()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self._let_go()
        super().teardown(trainer, pl_module, stage)

    @override
    def window(self, max_epochs: int | None) -> tuple[float, float] | None:
        """From the first observation to the end: the ranges belong to the network that is exported."""
        return resolve_moment("start", self.start, max_epochs), 1.0

    @override
    def int8_weights(self) -> Int8Weights:
        """By the recipe's rule; layers with another one of their own are known when the network is."""
        rule = self.recipe.rule().weight
        return Int8Weights(self.recipe.engine, rule.high if rule.bits == 8 else 0)

    # Private: the small questions the hooks ask.

    def _attach(self, pl_module: LightningModule, learned: Mapping[str, Tensor] | None = None) -> None:
        if self._attachment is None:
            self._attachment = attach_from(pl_module, self.state(pl_module), learned)

    def _let_go(self) -> None:
        if self._capture is not None:
            self._capture.remove()
        if self._attachment is not None:
            self._attachment.let_go()
        self._capture, self._attachment = None, None

    def _goes_on_from_quantize(self, trainer: Trainer, state: dict[str, Any]) -> bool:
        """Whether `quantize` has found the ranges, by the same recipe, and training rounds from its first batch on."""
        recipe = state.pop("recipe", None)  # so that a second fit begins anew, as it does otherwise
        found = None if recipe is None else [recipe, state["plan"], state["ranges"]]
        check_agreement(trainer, "what `quantize` has found", found)
        if recipe is None:
            return False
        if recipe == repr(self.recipe) and self._moments["start"] == 0.0:
            log_rank_zero(trainer, f"{self.method}: goes on from the ranges that `quantize` has found")
            return True
        log_rank_zero(
            trainer, f"{self.method}: observes anew, since `quantize` was given {recipe}, or training starts later"
        )
        return False

    def _begin_to_round(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state, attachment = self.state(pl_module), self._attachment
        assert attachment is not None
        state["form"] = attachment.form = "rounded"
        state["layers"] = attachment.plan.bits_of_layers(state["at_least"])
        state["learned"] |= first_values(attachment.grids, attachment.scales)
        self._learn(trainer, pl_module)
        if self._learned is not None:
            attachment.learned = self._learned.parameters
            attachment.use(state["ranges"], state["at_least"])
        reset_monitoring(trainer)  # else "best" is the float network
        log_rank_zero(trainer, f"{self.method}: {state['batches']} batches observed, from here on numbers are rounded")
        if unseen := attachment.plan.sites_of(_without_range(attachment.grids, state["ranges"])):
            _warn_of_unseen(unseen)

    def _learn(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = self.state(pl_module)
        if state["learned"]:
            self._learned = Learned(state, Plan.from_plain(state["plan"]), pl_module, trainer.optimizers)

    def _descend(self, state: dict[str, Any], progress: float) -> None:
        """Down the ladder from eight bits; step sizes that are learned grow, so that no grid ends earlier."""
        attachment = self._attachment
        if self._ladder is None or attachment is None:
            return
        bits = [rule.bits for rule in attachment.plan.weights.values()] + [grid.bits for grid in attachment.plan.grids]
        at_least = round(8 - self._ladder(progress) * (8 - min(bits)))
        if at_least == state["at_least"]:
            return
        before = attachment.highs()
        attachment.use(state["ranges"], at_least)
        for name, high in attachment.highs().items():
            if name in state["learned"]:
                state["learned"][name].mul_(before[name] / high)  # the parameters' own memory
        attachment.use(state["ranges"], at_least)
        state["at_least"] = at_least
        if state["form"] == "rounded":
            state["layers"] = attachment.plan.bits_of_layers(at_least)

    def _on_all_ranks(self, trainer: Trainer, seen: Tensor) -> Tensor:
        assert self._attachment is not None
        widest = self._attachment.shares.isnan()
        mean = reduce_mean(trainer, seen)
        if not widest.any():
            return mean
        outward = reduce_max(trainer, seen * seen.new_tensor([-1.0, 1.0])) * seen.new_tensor([-1.0, 1.0])
        return torch.where(widest.to(seen.device)[:, None], outward, mean)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._capture is None or self._capture.example is None:
            return
        state, example = self.state(pl_module), self._capture.example.to(pl_module)
        begin(state, pl_module, example, self.recipe)
        check_agreement(trainer, "where `QuantizationAwareTraining` rounds", state["plan"])
        self._attach(pl_module)
        layers, left = len(state["plan"]["weights"]), state["plan"]["left_float"]
        log_rank_zero(trainer, f"{self.method}: {layers} layers observed; left float: {left or 'none'}")

    def _why_nothing(self, state: dict[str, Any]) -> str:
        if "plan" not in state:
            return (
                f"the run was over before `start={self.start}`, or no step calls the module, `self(...)`, and it has "
                "no `example_input_array`."
            )
        if self._attachment is None:
            return "no convolution or linear layer was found whose weight can be rounded."
        return (
            f"the run was over after {state['batches']} of `observe_batches={self.observe_batches}`. Start earlier, or "
            "observe fewer."
        )


def _refuse_several(trainer: Trainer) -> None:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # an attribute set by a connector
    found = [repr(one) for one in callbacks if isinstance(one, QuantizationAwareTraining)]
    if len(found) > 1:
        raise ValueError(
            f"`callbacks=[{', '.join(found)}]`: expected one `QuantizationAwareTraining` in a Trainer, found "
            f"{len(found)}: numbers are rounded once. For layers with recipes of their own write one: "
            "`QuantizationAwareTraining(Mixed({'layer1.*': IntN(4)}, default=Int8()))`."
        )


def _without_range(grids: Sequence[Grid], ranges: Tensor) -> Iterator[int]:
    known = ranges.isfinite().all(1).tolist()
    return (place for place, grid in enumerate(grids) if not (grid.at_run_time or known[place]))


def _warn_of_unseen(sites: Sequence[str]) -> None:
    warnings.warn(
        f"`QuantizationAwareTraining`: expected finite numbers at all places that are rounded, found none at "
        f"{list(dict.fromkeys(sites))} in the batches that were observed: what is there stays float. Does "
        "`training_step` call `self(...)`, by the same way as the example?",
        stacklevel=2,
    )


def _is_gathering_statistics(trainer: Trainer) -> bool:
    return bool(getattr(trainer.fit_loop, "_skip_backward", False))
