"""Fit a lighter operator to the outputs of a layer, on the inputs that the layer has in the network."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_light.example_input import ExampleInput
from lightning_light.isolation import observe
from lightning_light.substitution.operators import Operator
from lightning_light.substitution.starts import channel_scales

__all__ = ["fit_operator", "record_layer"]

_LEARNING_RATE = 1e-3
_SAMPLES = 32  # in a step


def record_layer(model: nn.Module, name: str, calls: Sequence[ExampleInput]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the inputs and the outputs of a layer in ``calls`` of the model, which is left as it is, in float32."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def record(name: str, module: nn.Module, args: tuple[Tensor, ...], kwargs: Any, output: Tensor) -> None:
        inputs.append(args[0].float())
        outputs.append(output.float())

    observe(model, {name: model.get_submodule(name)}, calls, record)
    return inputs, outputs


@torch.no_grad()
def fit_operator(
    operator: Operator, conv: nn.Conv2d, inputs: Sequence[Tensor], outputs: Sequence[Tensor], steps: int
) -> tuple[nn.Module, float]:
    """Build the layers of ``operator``, start them from ``conv``, and fit them to ``outputs``.

    The loss is the squared error of each channel over its variance: what a batch norm that follows would see. Adam,
    with a learning rate that falls along a cosine. If the start has a lower error than the fit, it is the result.

    Args:
        operator: builds and starts the layers.
        conv: the old layer, left as it is.
        inputs: of the old layer, one per batch, in float32.
        outputs: of the old layer.
        steps: of Adam.

    Returns:
        The layers in evaluation mode, on the device and in the type of ``conv``, and their error: mean over channels.
    """
    plain = copy.deepcopy(conv).float()
    layers = operator.build(plain).to(plain.weight).eval()
    scales = channel_scales(outputs)[:, None, None]
    operator.start(layers, plain, inputs, outputs)
    best, error = copy.deepcopy(layers), _error(layers, inputs, outputs, scales)
    if steps:
        _train(layers, inputs, outputs, scales, steps)
        if (fitted := _error(layers.eval(), inputs, outputs, scales)) < error:
            best, error = layers, fitted
    return best.to(conv.weight), error


@torch.enable_grad()
def _train(layers: nn.Module, inputs: Sequence[Tensor], outputs: Sequence[Tensor], scales: Tensor, steps: int) -> None:
    layers.train()
    parameters = list(layers.requires_grad_().parameters())
    optimizer = torch.optim.Adam(parameters, _LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        x, y = inputs[step % len(inputs)], outputs[step % len(inputs)]
        if len(x) > _SAMPLES:
            chosen = torch.randperm(len(x), generator=generator)[:_SAMPLES].to(x.device)
            x, y = x[chosen], y[chosen]
        loss = ((layers(x) - y) / scales).square().mean()
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()
    for parameter in parameters:
        parameter.grad = None


def _error(layers: nn.Module, inputs: Sequence[Tensor], outputs: Sequence[Tensor], scales: Tensor) -> float:
    errors = [float(((layers(x) - y) / scales).square().mean()) for x, y in zip(inputs, outputs, strict=True)]
    return sum(errors) / len(errors)
