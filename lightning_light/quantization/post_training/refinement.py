"""After the ranges are known: layer by layer, from the input on, rounding is learned and biases are corrected.

The bias correction is the empirical one of Nagel et al., 2019, "Data-Free Quantization Through Weight Equalization and
Bias Correction", appendix D. https://arxiv.org/abs/1906.04721
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lightning_light.example_input import ExampleInput
from lightning_light.quantization.attachment import Attachment
from lightning_light.quantization.operations import BATCH_NORM, kind_of
from lightning_light.quantization.places import module_of
from lightning_light.quantization.post_training.adaround import AdaRound, learn_rounding
from lightning_light.quantization.post_training.bar import watched
from lightning_light.quantization.post_training.calls import Call, Parameters, batch_norm_gain, calls_of, inputs_of
from lightning_light.quantization.record import Operation, record
from lightning_light.quantization.rounding import integers, round_weight

__all__ = ["Refinement"]


@dataclass
class Refinement:
    """What comes after the ranges.

    Attributes:
        model: in evaluation mode, hooked by ``attachment``; its weights are float.
        attachment: knows the ranges, and rounds.
        inputs: calibration data.
        rounding: how rounding is learned, or None for nearest.
        correct_bias: whether the mean of every channel is put right.
        steps: of layers whose step size is learned later: those that their weights have been rounded by.
        nearest: layers whose weight is no parameter of their own, or not uniform, so that it is rounded to nearest.
        uncorrected: layers that have no bias to correct, neither their own nor a batch norm's.
    """

    model: nn.Module
    attachment: Attachment
    inputs: Sequence[ExampleInput]
    rounding: AdaRound | None
    correct_bias: bool
    steps: dict[str, Tensor]
    nearest: list[str] = field(default_factory=list)
    uncorrected: list[str] = field(default_factory=list)

    @torch.no_grad()
    def run(self, *, progress_bar: bool) -> None:
        """Change the weights and biases of ``model``."""
        before = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        with self._as_float(before):
            operations = record(self.model, self.inputs[0].args, self.inputs[0].kwargs)
            calls = calls_of(self.model, self.inputs[0])
        parameters = Parameters(self.model, calls)
        layers = [_Layer.of(one, calls) for one in operations if one.key in self.attachment.plan.weights]
        for layer in watched(layers, len(layers), "Rounding", shown=progress_bar):
            with self._as_float(before):
                inputs, weight = inputs_of(self.model, layer.key, self.inputs), layer.weight.detach()
                means = [layer.means(x, weight) for x in inputs] if self.correct_bias else []
                outputs = [layer.output(x, weight) for x in inputs] if self.rounding is not None else []
            inputs = inputs_of(self.model, layer.key, self.inputs)
            if self.rounding is not None:
                self._learn(layer, parameters, list(zip(inputs, outputs, strict=True)), self.rounding)
            if self.correct_bias:
                self._correct(layer, parameters, inputs, torch.stack(means))

    @contextmanager
    def _as_float(self, before: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the network as it was: its weights as they were, and nothing rounded."""
        changed = {name: parameter.data for name, parameter in self.model.named_parameters()}
        self.attachment.form = "plain"
        try:
            for name, parameter in self.model.named_parameters():
                parameter.data = before[name]
            yield
        finally:
            self.attachment.form = "rounded"
            for name, parameter in self.model.named_parameters():
                parameter.data = changed[name]

    def _learn(
        self, layer: _Layer, parameters: Parameters, batches: list[tuple[Tensor, Tensor]], settings: AdaRound
    ) -> None:
        rule, _ = self.attachment.weight(layer.key)
        if parameters.name_of(layer.weight) is None or rule.form != "uniform":
            self.nearest.append(module_of(layer.key))
            return
        weight = layer.weight.detach().float()
        largest = weight.abs().amax(list(range(int(rule.per_channel), weight.dim())), keepdim=True)
        learned = learn_rounding(
            weight,
            largest,
            rule.high,
            batches,
            layer.output,
            layer.call.channels,
            settings,
            subsets=layer.takes_subsets,
        )
        layer.weight.copy_(learned)
        if rule.learned:
            self.steps[layer.key] = integers(learned, replace(rule, learned=False))[1]

    def _correct(self, layer: _Layer, parameters: Parameters, inputs: list[Tensor], right: Tensor) -> None:
        weight = round_weight(layer.weight, *self.attachment.weight(layer.key))
        samples = torch.tensor([x.numel() for x in inputs]).to(right)
        shift = samples @ (right - torch.stack([layer.means(x, weight) for x in inputs])) / samples.sum()
        own, norm = layer.call.named.get("bias"), None if layer.norm is None else layer.norm.named
        if norm is not None and parameters.name_of(norm.get("bias")) is not None:
            norm["bias"].add_(shift)
        elif own is not None and parameters.name_of(own) is not None:
            own.add_(shift if norm is None else shift / batch_norm_gain(norm))
        else:
            self.uncorrected.append(module_of(layer.key))


@dataclass
class _Layer:
    """One layer with what its kernel computes along with it.

    Attributes:
        key: its operation.
        call: as it was called once.
        norm: the batch norm that is folded into it.
        relu: that follows.
    """

    key: str
    call: Call
    norm: Call | None
    relu: Call | None

    @classmethod
    def of(cls, operation: Operation, calls: Mapping[str, Call]) -> _Layer:
        tail, norm = operation, None
        if (follower := _only_user(tail)) is not None and follower.kind == BATCH_NORM:
            tail, norm = follower, calls[follower.key]
        follower = _only_user(tail)
        relu = calls[follower.key] if follower is not None and follower.kind in {"relu", "relu6"} else None
        return cls(operation.key, calls[operation.key], norm, relu)

    @property
    def weight(self) -> Tensor:
        """As it was called with: the parameter itself, if it is one."""
        weight: Tensor = self.call.named["weight"]
        return weight

    @property
    def takes_subsets(self) -> bool:
        """Whether the first dimension of its input counts samples."""
        return kind_of(self.call.name) == "linear" or self.call.named["input"].dim() == self.weight.dim()

    def before_relu(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer and its batch norm."""
        found = self.call.again(x, weight=weight)
        return found if self.norm is None else self.norm.again(found, training=False)

    def means(self, x: Tensor, weight: Tensor) -> Tensor:
        """``(channels,)``: of each channel before the ReLU."""
        found = self.before_relu(x, weight)
        return found.transpose(0, self.call.channels).flatten(1).mean(1)

    def output(self, x: Tensor, weight: Tensor) -> Tensor:
        """All of it."""
        found = self.before_relu(x, weight)
        return found if self.relu is None else self.relu.again(found)


def _only_user(operation: Operation) -> Operation | None:
    return operation.users[0] if len(operation.users) == 1 and not operation.is_output else None
