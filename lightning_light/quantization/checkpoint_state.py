"""What a quantized network keeps in its compression state, and how it is fake-quantized from there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_light.errors import LightningLightError, ManifestError
from lightning_light.example_input import ExampleInput
from lightning_light.quantization.encoding import decode, encode
from lightning_light.quantization.fake_quantize import merge_ranges
from lightning_light.quantization.fake_quantizer import FakeQuantizer
from lightning_light.quantization.learned_qparams import initial_values
from lightning_light.quantization.plan import QuantizationPlan, plan_quantization
from lightning_light.quantization.recipes import Recipe
from lightning_light.quantization.trace import trace_ops
from lightning_light.surgery.attachment import state_of
from lightning_light.validation import validated

__all__ = [
    "METHOD",
    "QuantizationState",
    "attach_fake_quantizer",
    "begin",
    "enable",
    "fake_quantized",
    "merge",
    "read_state",
]

METHOD = "quantization_aware_training"
"""Key of the method's state in the compression state."""


@dataclass
class QuantizationState:
    """What is kept, as a dict of plain types and tensors.

    Attributes:
        plan: which tensors are quantized.
        ranges: ``(activations, 2)``, as observed.
        engine: whose kernels will run it.
        batches: how many were observed.
        enabled: whether tensors are quantized; before, ranges are only observed.
        min_bits: stage of a bit-width schedule.
        learned: values of what is learned, by name.
        optimizer_groups: name of what is learned -> optimizer and parameter group that train it.
        layers: layer -> bits, for monitors.
        recipe: of `quantize`, which a training may continue.
    """

    plan: QuantizationPlan
    ranges: Tensor
    engine: str
    batches: int = 0
    enabled: bool = False
    min_bits: int = 0
    learned: dict[str, Tensor] = field(default_factory=dict)
    optimizer_groups: dict[str, list[int]] = field(default_factory=dict)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    recipe: str | None = None


def read_state(state: Mapping[str, Any]) -> QuantizationState:
    """The state of a module, validated.

    Raises:
        ManifestError: a part of it is damaged; the error names it.
    """
    found: QuantizationState = decode(QuantizationState, dict(state), METHOD)
    expected = (len(found.plan.activations), 2)
    if tuple(found.ranges.shape) != expected:
        raise ManifestError(
            f"The checkpoint's state `{METHOD}.ranges`: expected a tensor of shape {expected}, one row per quantized "
            f"activation of the plan, found {tuple(found.ranges.shape)}. It is damaged: take an earlier checkpoint."
        )
    return found


def begin(state: dict[str, Any], model: nn.Module, example: ExampleInput, recipe: Recipe) -> QuantizationPlan:
    """Plan the quantization of ``model``, and write a state in which nothing is observed yet."""
    nodes = trace_ops(model, example.args, example.kwargs).nodes
    layers = list(dict.fromkeys(node.id.module for node in nodes if node.role == "layer"))
    plan = plan_quantization(nodes, recipe.specs(model, layers))
    ranges = torch.tensor([[torch.inf, -torch.inf]] * len(plan.activations)).reshape(-1, 2)
    state.clear()
    state |= encode(QuantizationState(plan, ranges, recipe.engine))
    return plan


def merge(state: dict[str, Any], seen: Tensor, momentum: Tensor) -> None:
    """Merge the ranges of one batch into those of ``state``.

    Args:
        state: as `begin` has made it.
        seen: ``(activations, 2)``, of the batch.
        momentum: as in `merge_ranges`.
    """
    state["ranges"] = merge_ranges(state["ranges"].to(seen), seen, momentum.to(seen))
    state["batches"] += 1


def enable(state: dict[str, Any], quantizer: FakeQuantizer) -> None:
    """Quantize from now on, with the ranges that have been observed; what is learned begins with them."""
    state["enabled"] = quantizer.enabled = True
    state["layers"] = quantizer.plan.bits_of_layers(state["min_bits"])
    state["learned"] |= initial_values(quantizer.activations, quantizer.qparams)


def attach_fake_quantizer(model: nn.Module, state: dict[str, Any]) -> FakeQuantizer | None:
    """Hook ``model`` as ``state`` describes; None if there is no plan, or nothing in it.

    Args:
        model: that the plan is for.
        state: as `begin` has made it.

    Raises:
        ManifestError: ``state`` is damaged.
    """
    if not state.get("plan"):
        return None
    found = read_state(state)
    if not found.plan.layers:
        return None
    quantizer = FakeQuantizer(found.plan, found.engine, found.learned if found.enabled else None)
    quantizer.update(found.ranges, found.min_bits)
    quantizer.enabled = found.enabled
    quantizer.attach(model)
    return quantizer


@validated
@contextmanager
def fake_quantized(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, ``model`` is fake-quantized, and exporters write int8.

    Args:
        model: a module that `quantize` was called on or `QuantizationAwareTraining` has trained, in this process or
            loaded by ``lightning_light.load_from_checkpoint``.

    Note:
        A ``copy.deepcopy`` or pickle that is made inside stays fake-quantized. Made outside it has the ranges too, and
        is fake-quantized in a ``with`` of its own.

    Raises:
        LightningLightError: nothing in it has been quantized.
        ManifestError: its state is damaged.
    """
    states = [state for method, state in state_of(model).state.items() if method.startswith(METHOD)]
    quantizers = [found for state in states if (found := attach_fake_quantizer(model, state)) is not None]
    if not quantizers:
        raise LightningLightError(
            f"`fake_quantized` on `{type(model).__name__}`: expected a module that `quantize` was called on, or that "
            "`QuantizationAwareTraining` has trained, found no ranges in it. Give that module itself, not a part of it "
            "or what wraps it. A checkpoint keeps ranges: load it by `lightning_light.load_from_checkpoint`."
        )
    try:
        yield model
    finally:
        for quantizer in quantizers:
            quantizer.detach()
