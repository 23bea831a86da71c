"""`QuantizationAwareTraining`: fake-quantize weights and activations during training."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from torch import nn
from typing_extensions import override

from lightning_light.callback import CompressionCallback
from lightning_light.capture import Capture
from lightning_light.example_input import ExampleInput
from lightning_light.formatting import plural
from lightning_light.host.trainer import callbacks_of, is_accumulating, is_backward_skipped, is_restoring
from lightning_light.int8 import Int8Weights
from lightning_light.order import DEFAULT_WINDOWS, Stage
from lightning_light.progress import epochs_planned, steps_planned, training_progress
from lightning_light.quantization.checkpoint_state import SoundState, attach_fake_quantizer, begin, enable, merge
from lightning_light.quantization.fake_quantizer import FakeQuantizer
from lightning_light.quantization.functional import quantize
from lightning_light.quantization.learned_qparams import learned_parameters
from lightning_light.quantization.recipes import Int8, Recipe
from lightning_light.schedules import Cosine, Schedule, resolve, resolve_moment
from lightning_light.surgery.checkpoint_monitoring import reset_monitoring
from lightning_light.surgery.distributed import check_agreement, log_rank_zero, reduce_gradients, reduce_ranges
from lightning_light.surgery.optimizer import disown
from lightning_light.surgery.stored_example import restore_or_capture_example, store_example
from lightning_light.training_step import callable_with
from lightning_light.validation import Moment, PositiveInt, validated

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

__all__ = ["QuantizationAwareTraining"]


@validated
@dataclass(eq=False, repr=False)
class QuantizationAwareTraining(CompressionCallback):
    """Train with fake quantization in every forward pass, in place.

    From ``start`` on ranges of activations are observed for ``calibration_batches`` training batches; then weights and
    activations are fake-quantized, in training and in evaluation, with straight-through gradients. No module is
    replaced and no tensor of the module's ``state_dict`` is added or renamed: the operators are found by tracing one
    forward pass, and fake-quantized as they are called. Ranges are in the checkpoint's manifest. A module that
    `quantize` has quantized by the same recipe continues with its ranges, if ``start`` is 0.0: nothing is observed
    first. After the run the module computes in float again; inside `fake_quantized` it is quantized.

    A batch norm after a layer is folded into it at export. It needs no other treatment in training: weights have one
    scale per channel, so quantizing them before or after the fold is the same.

    Jacob et al., 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference".
    https://arxiv.org/abs/1712.05877

    Example:
        >>> from lightning_light.quantization import Int8, QuantizationAwareTraining
        >>> QuantizationAwareTraining(Int8(), start=0.5)
        QuantizationAwareTraining(start=0.5)

    Args:
        recipe: how many bits, and for whose kernels.
        start: when observation begins; an int is an epoch, a float a fraction of the run. The default
            follows the windows of the methods before it; 0.0 for a trained network.
        calibration_batches: training batches that are observed before anything is quantized.
        freeze_observers: from when on ranges stay as they are; 1.0 for never.
        freeze_batch_norm: from when on the batch norms that are folded use their running statistics and keep them; 1.0
            for never, 0.0 for a short run with a network that is trained already.
        bit_width_schedule: from eight bits (0.0) down to the fewest of the recipe (1.0).
            ``Window(Staircase(Linear(), steps=2), end=0.6)`` goes 8, 6, 4 for a recipe of four bits. None: at once.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, moments out of order, or a second such callback in the Trainer.
        TargetError: the recipe's ``exclude`` names nothing.
        OrderError: another method changes the structure after ``start``.

    Note:
        Prune, mask and factor layers before ``start``: ranges belong to the network that is exported. Parts that
        ``torch.compile`` has compiled run uncompiled from ``start`` on.

        Lightning's averaging callbacks put their weights into the live module, to validate and in the end: there they
        are quantized as its own. A ``copy.deepcopy`` or pickle of a fake-quantized module stays fake-quantized, with
        the ranges of that moment; make copies before ``start`` or after the run, and use `fake_quantized`.
    """

    method: ClassVar[str] = "quantization_aware_training"
    stage: ClassVar[int] = Stage.QUANTIZATION
    structural: ClassVar[bool] = False
    whole_parameters: ClassVar[tuple[str, str] | None] = (
        "whole weights are quantized by one scale per channel",
        "Train with fake quantization on one device or with `strategy='ddp'`.",
    )
    state_schema: ClassVar[Any] = Annotated[dict[str, Any], SoundState()]

    recipe: Recipe = Int8()
    _: KW_ONLY
    start: Moment = DEFAULT_WINDOWS[Stage.QUANTIZATION][0]
    calibration_batches: PositiveInt = 32
    freeze_observers: Moment = 0.9
    freeze_batch_norm: Moment = 0.95
    bit_width_schedule: Schedule | None = None

    def __post_init__(self) -> None:
        start, ranges, statistics = self.start, self.freeze_observers, self.freeze_batch_norm
        fractions = [one for one in (start, ranges, statistics) if isinstance(one, float)]
        if fractions != sorted(fractions):
            raise ValueError(
                f"`{type(self).__name__}(start={start}, freeze_observers={ranges}, freeze_batch_norm="
                f"{statistics})`: expected start <= freeze_observers <= freeze_batch_norm, found another order. "
                "To freeze nothing write 1.0."
            )
        self._warned = False
        self._bit_width_schedule: Schedule | None = None
        self._learned: dict[str, nn.Parameter] = {}
        self._moments: dict[str, float] = {}
        self._capture: Capture | None = None
        self._quantizer: FakeQuantizer | None = None

    # Lightning's hooks, in the order a run meets them.

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Resolve the moments, and refuse before training what cannot work."""
        super().setup(trainer, pl_module, stage)
        _refuse_several(trainer)
        if stage == "fit":
            epochs, names = epochs_planned(trainer), ("start", "freeze_observers", "freeze_batch_norm")
            self._moments = {name: self._resolved(name, epochs) for name in names}
            if self._moments["start"] >= 1.0:
                raise ValueError(
                    f"`{type(self).__name__}(start={self.start})`: expected a start before the end of the run, found "
                    f"`Trainer(max_epochs={trainer.max_epochs})`. Start earlier, for instance `start=0.7`."
                )
            self._bit_width_schedule = self.bit_width_schedule and resolve(self.bit_width_schedule, epochs)
            self.disclaim(pl_module)  # a fit starts over, unless a checkpoint brings the claim back

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue from the checkpoint, learned parameters in the optimizers before their state; or start over."""
        disown(trainer.optimizers, self._learned.values())  # of an earlier fit with the same optimizers
        self._learned = {}
        state = self.state(pl_module)
        continues = self._continues_from_quantize(trainer, state)
        if not is_restoring(trainer) and not continues:
            state.clear()
        self._attach(pl_module)
        if state.get("enabled"):
            self._claim_and_learn(trainer, pl_module)
        super().on_fit_start(trainer, pl_module)
        self.recipe.specs(pl_module, [])  # checks its patterns
        if "plan" not in state:
            self._capture = restore_or_capture_example(pl_module, state)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the run ends before the ranges are calibrated, while it can still be changed."""
        super().on_train_start(trainer, pl_module)
        if not self.state(pl_module).get("enabled") and not getattr(trainer, "fast_dev_run", False):
            batches = steps_planned(trainer) * trainer.accumulate_grad_batches
            left = math.floor((1.0 - self._moments["start"]) * batches)
            self._warned = left <= self.calibration_batches
            if self._warned:
                self._no_effect(
                    f"about {left} training batches remain after `start={self.start}`, and the first "
                    f"`calibration_batches={self.calibration_batches}` of them calibrate the ranges. Start earlier, or "
                    "calibrate on fewer batches."
                )

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fake-quantize in ``trainer.validate``, ``test`` and ``predict`` too; within ``fit`` that is so already."""
        self._attach(pl_module)

    on_test_start = on_predict_start = on_validation_start

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Enter the stage that is due: observe, quantize, freeze the ranges, freeze the statistics."""
        progress, state = training_progress(trainer), self.state(pl_module)
        if "plan" not in state and progress >= self._moments["start"]:
            self._begin(trainer, pl_module)
        if (quantizer := self._quantizer) is None:
            return
        self._reduce_bits(state, quantizer, progress)
        if not state["enabled"] and state["batches"] >= self.calibration_batches:
            self._enable(trainer, pl_module, quantizer)
        quantizer.observing = not state["enabled"] or progress < self._moments["freeze_observers"]
        # In its last epoch `StochasticWeightAveraging` collects statistics again, and does not train.
        freeze = progress >= self._moments["freeze_batch_norm"]
        quantizer.freeze_batch_norm = freeze and not is_backward_skipped(trainer)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """DDP does not know learned quantization parameters: take the mean of their gradients."""
        accumulating = pl_module.automatic_optimization and is_accumulating(trainer)
        if trainer.world_size > 1 and not accumulating:
            reduce_gradients(trainer, self._learned.values())

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the gradients that dampen oscillating weights, the more the nearer the end."""
        if self._quantizer is not None and self._quantizer.enabled:
            start = self._moments["start"]
            strength = Cosine()((training_progress(trainer) - start) / (1.0 - start))
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            self._quantizer.add_dampening_gradients(pl_module, parameters, strength)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Merge what this batch has shown on all ranks into the ranges; validation is never observed."""
        state, quantizer = self.state(pl_module), self._quantizer
        if "plan" not in state and self._capture is not None:
            self._capture.require(repr(self))
            store_example(state, self._capture)
        if quantizer is not None and quantizer.observing:
            quantizer.observing = False
            seen, momentum = quantizer.observer.take(pl_module.device), quantizer.observer.momentum
            merge(state, quantizer, reduce_ranges(trainer, seen, momentum.isnan()), momentum)
        elif quantizer is not None and quantizer.learned:
            quantizer.update(state["ranges"], state["min_bits"])

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if nothing was quantized."""
        if self._quantizer is not None:
            self._quantizer.freeze_batch_norm = False
        super().on_train_end(trainer, pl_module)

    @override
    def _no_effect_reason(self, pl_module: LightningModule) -> str | None:
        state = self.state(pl_module)
        if state.get("enabled") or self._warned:
            return None
        return (
            f"the run was over after {state.get('batches', 0)} of the `calibration_batches={self.calibration_batches}` "
            f"that follow `start={self.start}`. Start earlier, or observe fewer."
        )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        for held in (self._capture, self._quantizer):
            if held is not None:
                held.remove()
        self._capture, self._quantizer = None, None
        super().teardown(trainer, pl_module, stage)

    @override
    def window(self, max_epochs: int | None) -> tuple[float, float] | None:
        """From the first observation to the end: the ranges belong to the network that is exported."""
        return self._resolved("start", max_epochs), 1.0

    @override
    def last_change(self, max_epochs: int | None) -> float | None:
        return self._resolved("start", max_epochs)

    @override
    def int8_weights(self) -> Int8Weights | None:
        """By the recipe; layers with a recipe of their own are known when the network is."""
        spec = self.recipe.spec().weight
        return Int8Weights(self.recipe.engine, spec.quant_max if spec.bits == 8 else 0)

    @override
    def rehearse(self, model: nn.Module, example: ExampleInput, batches: Sequence[Any]) -> list[str]:
        """Quantize by the ranges of these batches; the copy stays fake-quantized."""
        quantize(model, example, self.recipe, data=list(batches) or None, progress_bar=False)
        quantizer = attach_fake_quantizer(model, self.state(model))
        assert quantizer is not None  # `quantize` has found layers
        lines = [
            f"{name}: weights of {bits['weight_bits']:g} bits, inputs of {bits.get('activation_bits', 32):g} bits"
            for name, bits in quantizer.plan.bits_of_layers().items()
        ]
        return lines + [f"{name}: left in float ({reason})" for name, reason in quantizer.plan.left_float.items()]

    # Private: the small questions the hooks ask.

    def _attach(self, pl_module: LightningModule) -> None:
        if self._quantizer is None:
            self._quantizer = attach_fake_quantizer(pl_module, self.state(pl_module))

    def _continues_from_quantize(self, trainer: Trainer, state: dict[str, Any]) -> bool:
        """Whether `quantize` has found the ranges, by the same recipe, and training quantizes from its first batch."""
        recipe = state.get("recipe")
        check_agreement(trainer, "what `quantize` has found", recipe and [recipe, state["plan"], state["ranges"]])
        if recipe is None:
            return False
        state["recipe"] = None  # so that a second fit starts over, as it does otherwise
        if recipe == repr(self.recipe) and self._moments["start"] == 0.0:
            log_rank_zero(trainer, f"{self.method}: continues with the ranges that `quantize` has found")
            return True
        log_rank_zero(trainer, f"{self.method}: observes again: `quantize` had {recipe}, or training starts later")
        return False

    def _enable(self, trainer: Trainer, pl_module: LightningModule, quantizer: FakeQuantizer) -> None:
        state = self.state(pl_module)
        enable(state, quantizer)
        self._claim_and_learn(trainer, pl_module)
        reset_monitoring(trainer)  # else "best" is the float network
        self.log_event(trainer, pl_module, f"enabled after {state['batches']} calibration batches")
        sites, specs = quantizer.plan.sites(), quantizer.activations
        if unseen := {op.module: 0 for op, at in sites if quantizer.qparams[at] is None and not specs[at].is_dynamic}:
            warnings.warn(
                "`QuantizationAwareTraining`: expected finite values of all quantized activations, found none at "
                f"{list(unseen)} in the calibration batches: those stay float. Does `training_step` call "
                "`self(...)`, in the same way as the example?",
                stacklevel=2,
            )

    def _claim_and_learn(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Claim the quantized layers, and give the optimizers what is learned."""
        state, quantizer = self.state(pl_module), self._quantizer
        self.claim(pl_module, state["layers"])
        if state["learned"] and quantizer is not None:
            self._learned = learned_parameters(state, quantizer.plan, pl_module, trainer.optimizers)
            quantizer.learned = self._learned
            quantizer.update(state["ranges"], state["min_bits"])

    def _reduce_bits(self, state: dict[str, Any], quantizer: FakeQuantizer, progress: float) -> None:
        """Follow the bit-width schedule down; learned scales grow, so that no range becomes smaller."""
        if self._bit_width_schedule is None:
            return
        plan = quantizer.plan
        fewest = min([site.weight.bits for site in plan.layers.values()] + [spec.bits for spec in plan.activations])
        min_bits = round(8 - self._bit_width_schedule(progress) * (8 - fewest))
        if min_bits == state["min_bits"]:
            return
        quantizer.reduce_bits(state["ranges"], min_bits, state["learned"])
        state["min_bits"] = min_bits
        if state["enabled"]:
            state["layers"] = plan.bits_of_layers(min_bits)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._capture is None or self._capture.example is None:
            return
        state, example = self.state(pl_module), self._capture.example.to(pl_module)
        with callable_with(pl_module, example):
            plan = begin(state, pl_module, example, self.recipe)
        check_agreement(trainer, "the plan of `QuantizationAwareTraining`", state["plan"])
        self.claim(pl_module, plan.bits_of_layers())
        self._attach(pl_module)
        if not plan.layers:
            self._warned = True
            self._no_effect("no convolution or linear layer was found whose weight can be quantized.")
        kept = f", {plural(len(plan.left_float), 'layer')} left in float" if plan.left_float else ""
        self.log_event(trainer, pl_module, f"observing {plural(len(plan.layers), 'layer')}{kept}")
        for name, reason in plan.left_float.items():
            log_rank_zero(trainer, f"{self.method}: {name} left in float: {reason}", level=logging.DEBUG)

    def _resolved(self, name: str, max_epochs: int | None) -> float:
        """The argument ``name`` as a fraction of the run; nothing is frozen from an epoch after the last on."""
        moment: Moment = getattr(self, name)
        within = moment if name == "start" or isinstance(moment, float) else min(moment, max_epochs or 0)
        return resolve_moment(within, max_epochs, f"{type(self).__name__}({name}={moment})")


def _refuse_several(trainer: Trainer) -> None:
    found = [repr(one) for one in callbacks_of(trainer) if isinstance(one, QuantizationAwareTraining)]
    if len(found) > 1:
        raise ValueError(
            f"`callbacks=[{', '.join(found)}]`: expected one `QuantizationAwareTraining` in a Trainer, found "
            f"{len(found)}. For layers with recipes of their own write one: "
            "`QuantizationAwareTraining(MixedPrecision({'layer1.*': IntN(4)}, default=Int8()))`."
        )
