"""Refine a calibrated network layer by layer, from the input on: learn the rounding, and correct biases.

The bias correction is the empirical one of Nagel et al., 2019, "Data-Free Quantization Through Weight Equalization and
Bias Correction", appendix D. https://arxiv.org/abs/1906.04721
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lightning_light.example_input import ExampleInput
from lightning_light.progress_bar import with_progress_bar
from lightning_light.quantization.fake_quantize import fake_quantize_weight, gain_and_shift, quantize_weight
from lightning_light.quantization.fake_quantizer import FakeQuantizer
from lightning_light.quantization.learned_qparams import weight_scale
from lightning_light.quantization.op_calls import OpId
from lightning_light.quantization.post_training.adaround import AdaRound, learn_rounding
from lightning_light.quantization.trace import OpNode, WritableParameters, inputs_of_layer, trace_ops

__all__ = ["Refinement"]


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
        parameters = WritableParameters(self.model, trace)
        first = {node.id: node for node in trace_ops(self.original, self.inputs[0].args, self.inputs[0].kwargs).nodes}
        layers = [_Layer.of(node) for node in trace.nodes if node.id in self.quantizer.plan.layers]
        for layer in with_progress_bar(layers, len(layers), "Refining layers", shown=progress_bar):
            before = _Layer.of(first[layer.id])
            inputs = inputs_of_layer(self.original, layer.id, self.inputs)
            means = [before.means(x, before.weight) for x in inputs] if self.correct_bias else []
            outputs = [before.output(x, before.weight) for x in inputs] if self.rounding is not None else []
            inputs = inputs_of_layer(self.model, layer.id, self.inputs)
            if self.rounding is not None:
                self._learn(layer, parameters, list(zip(inputs, outputs, strict=True)), self.rounding)
            if self.correct_bias:
                self._correct(layer, parameters, inputs, torch.stack(means))

    def _learn(
        self, layer: _Layer, parameters: WritableParameters, batches: list[tuple[Tensor, Tensor]], settings: AdaRound
    ) -> None:
        spec, _ = self.quantizer.weight(layer.id)
        if parameters.name_of(layer.weight) is None or spec.form != "uniform":
            self.nearest.append(layer.id.module)
            return
        weight, channels = layer.weight.detach().float(), layer.node.channel_dim
        learned = learn_rounding(weight, spec, batches, layer.output, channels, settings, subsets=layer.takes_subsets)
        layer.weight.copy_(learned)
        if spec.learned:
            self.scales[weight_scale(layer.id)] = quantize_weight(learned, replace(spec, learned=False))[1]

    def _correct(self, layer: _Layer, parameters: WritableParameters, inputs: list[Tensor], right: Tensor) -> None:
        weight, _ = fake_quantize_weight(layer.weight, *self.quantizer.weight(layer.id))
        samples = torch.tensor([x.numel() for x in inputs]).to(right)
        shift = samples @ (right - torch.stack([layer.means(x, weight) for x in inputs])) / samples.sum()
        own, norm = layer.node.named.get("bias"), None if layer.norm is None else layer.norm.named
        if norm is not None and parameters.name_of(norm.get("bias")) is not None:
            norm["bias"].add_(shift)
        elif own is not None and parameters.name_of(own) is not None:
            own.add_(shift if norm is None else shift / gain_and_shift(norm)[0])
        else:
            self.uncorrected.append(layer.id.module)


@dataclass
class _Layer:
    """One layer with the batch norm and the ReLU that its kernel computes along with it."""

    node: OpNode
    norm: OpNode | None
    relu: OpNode | None

    @classmethod
    def of(cls, node: OpNode) -> _Layer:
        parts = node.followers("batch_norm", "activation")
        return cls(node, parts.get("batch_norm"), parts.get("activation"))

    @property
    def id(self) -> OpId:
        return self.node.id

    @property
    def weight(self) -> Tensor:
        """As it was called with: the parameter itself, if it is one."""
        weight: Tensor = self.node.named["weight"]
        return weight

    @property
    def takes_subsets(self) -> bool:
        """Whether the first dimension of its input counts samples."""
        return self.node.operator.name == "linear" or self.node.named["input"].dim() == self.weight.dim()

    def before_relu(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer and its batch norm."""
        found = self.node.rerun(x, weight=weight)
        return found if self.norm is None else self.norm.rerun(found, training=False)

    def means(self, x: Tensor, weight: Tensor) -> Tensor:
        """``(channels,)``: of each channel before the ReLU."""
        found = self.before_relu(x, weight)
        return found.transpose(0, self.node.channel_dim).flatten(1).mean(1)

    def output(self, x: Tensor, weight: Tensor) -> Tensor:
        """All of it."""
        found = self.before_relu(x, weight)
        return found if self.relu is None else self.relu.rerun(found)
