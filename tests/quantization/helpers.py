"""Networks that are planned, calibrated and fake-quantized without a Trainer."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_light.example_input import ExampleInput
from lightning_light.quantization.checkpoint_state import attach_fake_quantizer, begin
from lightning_light.quantization.fake_quantizer import FakeQuantizer
from lightning_light.quantization.learned_qparams import initial_values
from lightning_light.quantization.plan import QuantizationPlan, plan_quantization
from lightning_light.quantization.recipes import Int8, Recipe
from lightning_light.quantization.trace import trace_ops
from lightning_light.surgery.attachment import attach, release

A, B = TypeVar("A"), TypeVar("B")


def in_turn(first: Sequence[A], second: Sequence[B]) -> list[tuple[A, B]]:
    """Each of ``first`` with one of ``second``, which take turns: a cover of both, not of all pairs.

    Example:
        >>> in_turn("abc", [1, 2])
        [('a', 1), ('b', 2), ('c', 1)]
    """
    return [(one, second[place % len(second)]) for place, one in enumerate(first)]


def plan_of(model: nn.Module, *args: Any, recipe: Recipe = Int8(), **kwargs: Any) -> QuantizationPlan:
    return plan_quantization(model, trace_ops(model, args, kwargs).nodes, recipe)


def calibrated(model: nn.Module, example: ExampleInput, recipe: Recipe = Int8()) -> FakeQuantizer:
    """Attached, having observed the example, and enabled."""
    attach(model)
    release(model)
    state: dict[str, Any] = {}
    begin(state, model, example, recipe)
    quantizer = attach_fake_quantizer(model, state)
    assert quantizer is not None
    quantizer.observing = True
    with torch.no_grad():
        model(*example.args, **example.kwargs)
    quantizer.observing, quantizer.enabled = False, True
    observer = quantizer.observer
    ranges = observer.take(torch.device("cpu"))
    quantizer.update(ranges)
    quantizer.learned = {**observer.weight_scales, **initial_values(quantizer.activations, quantizer.qparams)}
    quantizer.update(ranges)
    return quantizer


def decibels(right: Tensor, found: Tensor) -> float:
    return float(10 * torch.log10(right.square().sum() / (right - found).square().sum()))


class Beside(nn.Module):
    """Networks beside one another, each with an input and an output of its own: one file for all of them."""

    def __init__(self, **networks: nn.Module) -> None:
        super().__init__()
        for name, network in networks.items():
            self.add_module(name, network)

    def forward(self, *inputs: Tensor) -> tuple[Any, ...]:
        return tuple(network(x) for network, x in zip(self.children(), inputs, strict=True))
