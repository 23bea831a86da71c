"""Fake quantization in place: hooks on the user's modules, and nothing else of theirs is touched."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_light.host.patches import InstancePatch
from lightning_light.isolation import uncompile
from lightning_light.quantization.fake_quantize import (
    SMALLEST_SCALE,
    dampening_gradient,
    fake_quantize,
    fake_quantize_bias,
    fake_quantize_dynamic,
    fake_quantize_learned,
    fake_quantize_weight,
    gain_and_shift,
    initial_scale,
    qparams_of,
    widest,
)
from lightning_light.quantization.learned_qparams import learned_by, learned_qparams_of, names_of, weight_scale
from lightning_light.quantization.op_calls import OpCall, OpId, OpStack
from lightning_light.quantization.operators import arguments
from lightning_light.quantization.plan import QuantizationPlan
from lightning_light.quantization.specs import ActivationSpec, QParams, WeightSpec
from lightning_light.surgery.attachment import has_state, state_of

__all__ = ["FakeQuantizer", "RangeObserver"]


class RangeObserver:
    """Collects what the observers of the activations find.

    Args:
        specs: of the activations.

    Attributes:
        momentum: ``(n,)``, weight of a new batch in each moving average; nan for the widest range of all batches.
        weight_scales: LSQ's first scale of each learned weight that was seen, by name.
    """

    def __init__(self, specs: Sequence[ActivationSpec]) -> None:
        momenta = (spec.observer.momentum for spec in specs)
        self.momentum = torch.tensor([torch.nan if momentum is None else momentum for momentum in momenta])
        self.weight_scales: dict[str, Tensor] = {}
        self._found: dict[int, Tensor] = {}

    def observe(self, activation: int, spec: ActivationSpec, x: Tensor) -> None:
        """Take in the values of one activation."""
        if spec.is_dynamic or not x.numel():
            return
        found = spec.observer.range_of(x.detach().float(), spec.quant_max, spec.non_negative)
        if spec.non_negative:
            found = found.clamp_min(0.0)
        self._found[activation] = widest(self._found.get(activation, found), found)

    def take(self, device: torch.device) -> Tensor:
        """``(n, 2)``: the ranges since the last call; (inf, -inf) where nothing was observed."""
        nothing = torch.tensor([torch.inf, -torch.inf], device=device)
        ranges = [self._found.get(activation, nothing).to(device) for activation in range(len(self.momentum))]
        self._found = {}
        return torch.stack(ranges) if ranges else torch.empty(0, 2, device=device)


class OpHandler(Protocol):
    """Computes operator calls in place of the fake quantizer."""

    def handle(self, call: OpCall) -> Any:
        """Return the result of one operator call."""

    def output(self, output: Any) -> Any:
        """Return what the network returns in place of ``output``; None for ``output`` itself."""


class FakeQuantizer(OpStack):
    """Fake-quantizes one network by a plan, as long as it is attached.

    Args:
        plan: of the network.
        engine: whose kernels will run it.
        learned: values of what is learned, by name.

    Attributes:
        enabled: whether tensors are quantized; else the network computes in float.
        observing: whether ranges are observed.
        observer: collects them.
        freeze_batch_norm: whether folded batch norms use, and keep, the statistics that they have.
        lowering: computes instead, while the network is exported.
        min_bits: no tensor has fewer bits, for now.
        activations: the plan's, with no fewer than ``min_bits``.
        qparams: of each activation; None where nothing was observed, and for dynamic quantization.
    """

    def __init__(self, plan: QuantizationPlan, engine: str, learned: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(self._handle_call)
        self.plan, self.engine = plan, engine
        self.learned: Mapping[str, Tensor] = learned or {}
        self.enabled = self.observing = self.freeze_batch_norm = False
        self.observer = RangeObserver(plan.activations)
        self.lowering: OpHandler | None = None
        self.min_bits = 0
        self.activations = list(plan.activations)
        self.qparams: list[QParams | None] = []
        self.weights = {op: site.weight for op, site in plan.layers.items()}
        self._values: dict[str, Tensor] = {}  # what is learned, without gradients
        self._folded = frozenset(site.fused.batch_norm for site in plan.layers.values())
        self._active: list[object] = []  # of the compression state, where exporters look
        self._norms: dict[OpId, tuple[Tensor, Tensor | None]] = {}  # folded ones: unit and bias of the layer before
        self._compiled: list[InstancePatch] = []

    def attach(self, model: nn.Module) -> None:
        """Hook ``model``; modules that are compiled in place run as written until `remove`."""
        self.watch(model)
        if has_state(model):
            self._active = state_of(model).active
            self._active.append(self)
        self._compiled = uncompile(model)

    @override
    def remove(self) -> None:
        super().remove()
        self._active[:] = [one for one in self._active if one is not self]
        while self._compiled:
            self._compiled.pop().undo()

    def update(self, ranges: Tensor, min_bits: int = 0) -> None:
        """Compute all quantization parameters from ``ranges`` and what is learned, with no fewer than ``min_bits``."""
        if min_bits != self.min_bits:
            self.weights = {op: site.weight.with_min_bits(min_bits) for op, site in self.plan.layers.items()}
            self.activations = [spec.with_min_bits(min_bits) for spec in self.plan.activations]
        self._values = {name: value.detach() for name, value in self.learned.items()}
        self.min_bits, self.qparams = min_bits, qparams_of(self.activations, ranges)
        for activation, spec in enumerate(self.activations):
            self.qparams[activation] = learned_qparams_of(self.learned, activation, spec) or self.qparams[activation]

    def reduce_bits(self, ranges: Tensor, min_bits: int, learned: Mapping[str, Tensor]) -> None:
        """Go on to another stage of a bit-width schedule; ``learned`` scales grow, so that no range becomes smaller."""
        for name, (_, spec, quantity) in learned_by(self.plan).items():
            if name in learned and quantity == "scale":
                before, after = (spec.with_min_bits(bits).quant_max for bits in (self.min_bits, min_bits))
                learned[name].mul_(before / after)  # the parameters' own memory
        self.update(ranges, min_bits)

    def weight(self, op: OpId) -> tuple[WeightSpec, Tensor | None]:
        """How the weight of a layer call is quantized, and its scale if that is learned."""
        spec = self.weights[op]
        values = self.learned if torch.is_grad_enabled() else self._values  # a tracer takes no parameters of ours
        return spec, values.get(weight_scale(op)) if spec.learned else None

    @torch.no_grad()
    def add_dampening_gradients(self, model: nn.Module, parameters: Iterable[nn.Parameter], strength: float) -> None:
        """Add the gradient of the penalty on oscillations to the ``.grad`` of all weights that are dampened.

        Args:
            model: the live module.
            parameters: those of the coming optimizer step; other weights are left alone.
            strength: fraction of the full penalty, in [0, 1].
        """
        mine = set(parameters)
        for op in self.plan.layers:
            spec, scale = self.weight(op)
            weight = getattr(model.get_submodule(op.module), "weight", None)
            if spec.dampening and scale is not None and weight in mine and weight.grad is not None:
                weight.grad.add_((strength * dampening_gradient(weight, spec, scale)).to(weight.grad.dtype))

    @override
    def begin(self, args: tuple[Any, ...]) -> None:
        super().begin(args)
        self._norms = {}
        if self.enabled and self.lowering is None and torch.compiler.is_exporting():
            warnings.warn(
                "`torch.export` of a fake-quantized network: found no lowering, so that quantization is exported as "
                "float operators. Export the module that was quantized, not a part of it, by `export_model`.",
                stacklevel=2,
            )

    @override
    def output(self, output: Any) -> Any:
        return None if self.lowering is None else self.lowering.output(output)

    # Operator calls.

    def _handle_call(self, call: OpCall) -> Any:
        return self.compute(call) if self.lowering is None else self.lowering.handle(call)

    def compute(self, call: OpCall) -> Any:
        """Run one operator call, with fake-quantized weight, inputs and output where the plan has them."""
        self.prepare(call)
        result = call.run()
        activation = self.plan.outputs.get(call.id)
        return result if activation is None else self.quantize(activation, result)

    def prepare(self, call: OpCall) -> None:
        """Fake-quantize the weight of a call, and inputs of the network."""
        self.plan.replace_inputs(call, self.quantize)
        if self.freeze_batch_norm and call.id in self._folded:
            call.set("training", 5, False)
        if call.id in self._norms:
            self._quantize_folded_bias(call)
        if call.id in self.plan.layers:
            weight, (spec, scale) = call.get("weight", 1), self.weight(call.id)
            if self.enabled:
                weight, scale = fake_quantize_weight(weight, spec, scale)
                call.set("weight", 1, weight)
                self._quantize_bias(call, scale)
            elif self.observing and spec.learned:
                self.observer.weight_scales[weight_scale(call.id)] = initial_scale(weight, spec)

    def _quantize_bias(self, call: OpCall, scale: Tensor) -> None:
        """Fake-quantize the bias of an int8 layer, or leave that to the batch norm that is folded into it."""
        site = self.plan.layers[call.id]
        reads = None if site.input is None else self.qparams[site.input]
        if reads is None or self.engine == "x86":  # whose kernels add biases in float
            return
        bias, unit = call.get("bias", 2), scale.double() * reads.scale
        if site.fused.batch_norm is not None:
            self._norms[site.fused.batch_norm] = unit, bias
        elif bias is not None:
            call.set("bias", 2, fake_quantize_bias(bias, unit))

    def _quantize_folded_bias(self, call: OpCall) -> None:
        """Fake-quantize the bias that results from folding a batch norm with running statistics."""
        unit, bias = self._norms.pop(call.id)
        if call.get("training", 5) or call.get("running_var", 2) is None:
            return
        named = arguments(call)
        gain, shift = gain_and_shift(named, bias)
        error = fake_quantize_bias(shift, unit * gain.abs().clamp_min(SMALLEST_SCALE)) - shift
        own = named.get("bias")
        call.set("bias", 4, error.to(call.input.dtype) if own is None else own + error.to(own.dtype))

    def quantize(self, activation: int, x: Any) -> Any:
        """Fake-quantize an activation; what is no floating point tensor, or was never observed, stays as it is."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        spec = self.activations[activation]
        if self.observing and not (spec.learned and self.enabled):
            self.observer.observe(activation, spec, x)
        if not self.enabled:
            return x
        if spec.is_dynamic:
            return fake_quantize_dynamic(x, spec)
        values = self.learned if torch.is_grad_enabled() else self._values
        learned = [values[name] for name in names_of(activation, spec).values() if name in values]
        if learned:
            return fake_quantize_learned(x, spec, *learned)
        qparams = self.qparams[activation]
        return x if qparams is None else fake_quantize(x, qparams)
