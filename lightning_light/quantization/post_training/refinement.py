"""Refine a calibrated network layer by layer, from the input on: learn the rounding (AdaRound), and correct biases.

The bias correction is the empirical one of Nagel et al., 2019, "Data-Free Quantization Through Weight Equalization and
Bias Correction", appendix D. https://arxiv.org/abs/1906.04721
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_light.example_input import ExampleInput
from lightning_light.progress_bar import with_progress_bar
from lightning_light.quantization.fake_quantize import (
    SMALLEST_SCALE,
    fake_quantize_weight,
    gain_and_shift,
    quantize_weight,
)
from lightning_light.quantization.fake_quantizer import FakeQuantizer
from lightning_light.quantization.learned_qparams import weight_scale
from lightning_light.quantization.specs import WeightSpec
from lightning_light.quantization.trace import OpNode, inputs_of_layer, trace_ops, writable_parameters
from lightning_light.validation import FractionBelowOne, PositiveFloat, PositiveInt, validated

__all__ = ["AdaRound", "Refinement", "dequantized", "learn_rounding", "logits_of", "rectified_sigmoid", "regularizer"]


ZETA, GAMMA = 1.1, -0.1
Batch = tuple[Tensor, Tensor]


@validated
@dataclass(frozen=True)
class AdaRound:
    """Learn which weights to round up and which down, without labels: nearest is not best.

    With ``h(V) = clip(sigmoid(V) * (zeta - gamma) + gamma, 0, 1)``, ``zeta = 1.1``, ``gamma = -0.1``, the weight
    ``s * clip(floor(w / s) + h(V))`` of each layer minimizes ``|f(W x) - f(W~ x~)|^2 + regularization * sum(1 - |2 h(V)
    - 1|^beta)``, where ``x~`` is the layer's input in the network that is quantized so far and ``f`` its batch norm and
    ReLU; ``beta`` falls along a cosine, so that in the end every ``h`` is 0 or 1.

    Nagel, Amjad, van Baalen, Louizos, Blankevoort, 2020, "Up or Down? Adaptive Rounding for Post-Training
    Quantization". https://arxiv.org/abs/2004.10568

    Example:
        >>> AdaRound(steps=500)
        AdaRound(steps=500, ...)

    Args:
        steps: of Adam, for each layer. The paper takes 10,000.
        batch_size: samples in a step; of one calibration batch, drawn again each time.
        learning_rate: Adam's.
        regularization: weight of the term that drives ``h`` to 0 or 1; the paper's is 0.01.
        warm_up: fraction of the steps without that term.
        beta: its exponent after the warm-up, and at the end.
        seed: of the batches.

    Raises:
        ValueError: an argument out of range.
    """

    steps: PositiveInt = 1000
    batch_size: PositiveInt = 32
    learning_rate: PositiveFloat = 0.01
    regularization: PositiveFloat = 0.01
    warm_up: FractionBelowOne = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.beta[0] >= self.beta[1] > 1:
            raise ValueError(
                f"`AdaRound(beta={self.beta})`: expected two exponents that fall, above 1, found others. Write "
                "for instance (20.0, 2.0)."
            )

    def beta_at(self, step: int) -> float | None:
        """The exponent at ``step``; None in the warm-up.

        Example:
            >>> settings = AdaRound(steps=100, warm_up=0.2)
            >>> settings.beta_at(19), settings.beta_at(20), settings.beta_at(60)
            (None, 20.0, 11.0)
        """
        begin = self.warm_up * self.steps
        if step < begin:
            return None
        first, last = self.beta
        return last + (first - last) * (1 + math.cos(math.pi * (step - begin) / (self.steps - begin))) / 2


def rectified_sigmoid(v: Tensor) -> Tensor:
    """``h(V) = clip(sigmoid(V) * (zeta - gamma) + gamma, 0, 1)``: reaches 0 and 1, where its gradient is 0."""
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def logits_of(h: Tensor) -> Tensor:
    """The ``V`` of ``h`` in [0, 1].

    Example:
        >>> rectified_sigmoid(logits_of(torch.tensor([0.0, 0.25, 1.0])))
        tensor([0.0000, 0.2500, 1.0000])
    """
    return -((ZETA - GAMMA) / (h - GAMMA) - 1).log()


def regularizer(h: Tensor, beta: float) -> Tensor:
    """``sum(1 - |2 h - 1|^beta)``: 0 where every ``h`` is 0 or 1."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def learn_rounding(
    weight: Tensor,
    spec: WeightSpec,
    batches: Sequence[Batch],
    forward: Callable[[Tensor, Tensor], Tensor],
    channels: int,
    settings: AdaRound,
) -> Tensor:
    """The dequantized weight ``s * q``: each ``q`` is next to ``weight / s``, above it or below.

    Zeros stay zero, so that masks survive, and what is largest in its channel stays as it is, so that the scale that
    is taken from the result is the same to the last bit. If nearest rounding has the smaller error, that is the result.

    Args:
        weight: the float weight.
        spec: how it is quantized, uniformly.
        batches: inputs of the quantized network with outputs of the float one.
        forward: input and weight -> output.
        channels: the dimension of an output that counts channels.
        settings: how it is learned.
    """
    limit = spec.quant_max
    largest = weight.abs().amax(list(range(int(spec.per_channel), weight.dim())), keepdim=True)
    scale = (largest / limit).clamp_min(SMALLEST_SCALE)
    nearest, down = (weight / scale).round(), (weight / scale).floor()
    fixed = (weight == 0) | (weight.abs() == largest) | (nearest == weight / scale)

    def error(q: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return (forward(x, q * scale) - y).square().sum(channels).mean()

    def weights(h: Tensor) -> Tensor:
        return torch.where(fixed, nearest, (down + h).clamp(-limit, limit))

    v = logits_of(weight / scale - down).requires_grad_()
    optimizer = torch.optim.Adam([v], settings.learning_rate)
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.enable_grad():
        for step in range(settings.steps):
            h, beta = rectified_sigmoid(v), settings.beta_at(step)
            loss = error(weights(h), *_drawn(batches, settings.batch_size, generator))
            if beta is not None:
                loss = loss + settings.regularization * regularizer(h[~fixed], beta)
            (v.grad,) = torch.autograd.grad(loss, v)  # and none of the network's own parameters
            optimizer.step()
    with torch.no_grad():
        learned = weights((rectified_sigmoid(v) >= 0.5).to(v))
        before, after = (sum(float(error(q, x, y)) for x, y in batches) for q in (nearest, learned))
        return dequantized(learned if after < before else nearest, largest, limit)


def dequantized(q: Tensor, largest: Tensor, limit: int) -> Tensor:
    """``q * largest / limit``, where ``limit`` gives ``largest`` itself and not what it is rounded to in between."""
    return torch.where(q.abs() == limit, q.sign() * largest, q * (largest / limit).clamp_min(SMALLEST_SCALE))


def _drawn(batches: Sequence[Batch], size: int, generator: torch.Generator) -> Batch:
    x, y = batches[int(torch.randint(len(batches), (), generator=generator))]
    if size >= len(x):
        return x, y
    chosen = torch.randperm(len(x), generator=generator)[:size].to(x.device)
    return x[chosen], y[chosen]


@dataclass
class Refinement:
    """Change the weights and biases of a calibrated network.

    Attributes:
        model: in evaluation mode, hooked by ``quantizer``; its weights are float.
        original: a copy of it as it was, not hooked.
        quantizer: with all ranges, enabled.
        inputs: calibration data.
        rounding: how rounding is learned, or None for nearest.
        correct_bias: whether the mean of every channel is corrected.
        scales: of learned weights: those that their weights have been rounded by.
        nearest: layers whose weight is no parameter of their own, or not uniform, so that it is rounded to nearest.
        uncorrected: layers that have no bias to correct, neither their own nor a batch norm's.
    """

    model: nn.Module
    original: nn.Module
    quantizer: FakeQuantizer
    inputs: Sequence[ExampleInput]
    rounding: AdaRound | None
    correct_bias: bool
    scales: dict[str, Tensor]
    nearest: list[str] = field(default_factory=list)
    uncorrected: list[str] = field(default_factory=list)

    @torch.no_grad()
    def run(self, *, progress_bar: bool) -> None:
        """Refine all layers."""
        trace = trace_ops(self.model, self.inputs[0].args, self.inputs[0].kwargs)
        parameters = writable_parameters(self.model, trace)
        first = {node.id: node for node in trace_ops(self.original, self.inputs[0].args, self.inputs[0].kwargs).nodes}
        layers = [_Layer(node) for node in trace.nodes if node.id in self.quantizer.plan.layers]
        for layer in with_progress_bar(layers, len(layers), "Refining layers", shown=progress_bar):
            before = _Layer(first[layer.node.id])
            inputs = inputs_of_layer(self.original, layer.node.id, self.inputs)
            means = [before.means(x, before.weight) for x in inputs] if self.correct_bias else []
            outputs = [before.output(x, before.weight) for x in inputs] if self.rounding is not None else []
            inputs = inputs_of_layer(self.model, layer.node.id, self.inputs)
            if self.rounding is not None:
                self._learn(layer, parameters, list(zip(inputs, outputs, strict=True)), self.rounding)
            if self.correct_bias:
                self._correct(layer, parameters, inputs, torch.stack(means))

    def _learn(self, layer: _Layer, parameters: Mapping[Any, str], batches: list[Batch], settings: AdaRound) -> None:
        spec, _ = self.quantizer.weight(layer.node.id)
        if parameters.get(layer.weight) is None or spec.form != "uniform":
            self.nearest.append(layer.node.id.module)
            return
        weight, channels = layer.weight.detach().float(), layer.node.channel_dim
        if channels == 0:  # the first dimension counts channels, not samples
            settings = replace(settings, batch_size=sys.maxsize)
        learned = learn_rounding(weight, spec, batches, layer.output, channels, settings)
        layer.weight.copy_(learned)
        if spec.learned:
            self.scales[weight_scale(layer.node.id)] = quantize_weight(learned, replace(spec, learned=False))[1]

    def _correct(self, layer: _Layer, parameters: Mapping[Any, str], inputs: list[Tensor], right: Tensor) -> None:
        weight, _ = fake_quantize_weight(layer.weight, *self.quantizer.weight(layer.node.id))
        samples = torch.tensor([x.numel() for x in inputs]).to(right)
        shift = samples @ (right - torch.stack([layer.means(x, weight) for x in inputs])) / samples.sum()
        own, norm = layer.node.named.get("bias"), None if layer.norm is None else layer.norm.named
        if norm is not None and parameters.get(norm.get("bias")) is not None:
            norm["bias"].add_(shift)
        elif own is not None and parameters.get(own) is not None:
            own.add_(shift if norm is None else shift / gain_and_shift(norm)[0])
        else:
            self.uncorrected.append(layer.node.id.module)


class _Layer:
    """One layer with the batch norm and the ReLU that its kernel computes along with it.

    Attributes:
        weight: as it was called with: the parameter itself, if it is one.
    """

    def __init__(self, node: OpNode) -> None:
        self.node, self.weight = node, node.named["weight"]
        fused = node.followers("batch_norm", "activation")
        self.norm, self._relu = fused.get("batch_norm"), fused.get("activation")

    def before_relu(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer and its batch norm."""
        found = self.node.rerun(x, weight=weight)
        return found if self.norm is None else self.norm.rerun(found, training=False)

    def means(self, x: Tensor, weight: Tensor) -> Tensor:
        """``(channels,)``: of each channel before the ReLU."""
        return self.before_relu(x, weight).transpose(0, self.node.channel_dim).flatten(1).mean(1)

    def output(self, x: Tensor, weight: Tensor) -> Tensor:
        """All of it."""
        found = self.before_relu(x, weight)
        return found if self._relu is None else self._relu.rerun(found)
