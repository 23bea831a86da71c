"""Dampen the oscillations of weights between two quantized values."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_light.quantization.fake_quantize import columns, fake_quantize_weight
from lightning_light.quantization.fake_quantizer import FakeQuantizer
from lightning_light.quantization.specs import WeightSpec

__all__ = ["add_dampening_gradients", "dampening_gradient"]


def dampening_gradient(w: Tensor, spec: WeightSpec, scale: Tensor) -> Tensor:
    """Return the gradient of ``dampening * sum((w_hat - clamp(w, s * quant_min, s * quant_max)) ** 2)``.

    ``w_hat``, the fake-quantized weight, is a constant; the learned scale gets no gradient.

    Nagel et al., 2022, "Overcoming Oscillations in Quantization-Aware Training", equation 7.
    https://arxiv.org/abs/2203.11086

    Args:
        w: the weight; no gradient is followed.
        spec: how it is quantized.
        scale: the learned scale, of each output channel or of all.
    """
    w, scale = w.detach().float(), scale.detach()
    quantized, found = fake_quantize_weight(w, spec, scale)
    step = columns(found, w)
    inside = (w >= step * spec.quant_min) & (w <= step * spec.quant_max)
    return 2.0 * spec.dampening * (w - quantized) * inside


@torch.no_grad()
def add_dampening_gradients(
    quantizer: FakeQuantizer, model: nn.Module, parameters: Iterable[nn.Parameter], strength: float
) -> None:
    """Add the gradient of the penalty to the ``.grad`` of all weights with learned scales that are dampened.

    Args:
        quantizer: of the network, with its current scales.
        model: the live module.
        parameters: those of the coming optimizer step; other weights are left alone.
        strength: fraction of the full penalty, in [0, 1].
    """
    mine = set(parameters)
    for op in quantizer.plan.layers:
        spec, scale = quantizer.weight(op)
        weight = getattr(model.get_submodule(op.module), "weight", None)
        if spec.dampening and scale is not None and weight in mine and weight.grad is not None:
            weight.grad.add_((strength * dampening_gradient(weight, spec, scale)).to(weight.grad.dtype))
