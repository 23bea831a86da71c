"""What a quantized network keeps in its compression state, and how it is fake-quantized from there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_light.encoding import decode, encode
from lightning_light.errors import LightningLightError
from lightning_light.example_input import ExampleInput
from lightning_light.int8 import LoweredModel, QDQConstraints, Quantizer
from lightning_light.nested import tensors_in
from lightning_light.quantization.fake_quantize import merge_ranges
from lightning_light.quantization.fake_quantizer import FakeQuantizer
from lightning_light.quantization.learned_qparams import initial_values, learned_by
from lightning_light.quantization.lowering.qdq import QDQLowering
from lightning_light.quantization.lowering.quantized_ops import QuantizedOpsLowering
from lightning_light.quantization.plan import QuantizationPlan, plan_quantization
from lightning_light.quantization.recipes import Engine, Recipe
from lightning_light.quantization.specs import WeightSpec
from lightning_light.quantization.trace import Trace, trace_ops
from lightning_light.schema import Context, Length, PlainExample, Rule, TensorOf, check_schema, damage
from lightning_light.surgery.attachment import state_of
from lightning_light.targets import Targets
from lightning_light.trained_weights import uncovered_parameters
from lightning_light.validation import NonNegativeFloat, NonNegativeInt, Range, validated

__all__ = ["METHOD", "SoundState", "attach_fake_quantizer", "begin", "enable", "fake_quantized", "merge", "read_state"]

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
    ranges: Annotated[Tensor, TensorOf("float", 2)]
    engine: Engine
    batches: NonNegativeInt = 0
    enabled: bool = False
    min_bits: Annotated[int, Range(0, 16)] = 0
    learned: dict[str, Annotated[Tensor, TensorOf("float", low=-math.inf)]] = field(default_factory=dict)
    optimizer_groups: dict[str, Annotated[list[NonNegativeInt], Length(2)]] = field(default_factory=dict)
    layers: dict[str, dict[str, NonNegativeFloat]] = field(default_factory=dict)
    recipe: str | None = None


def read_state(state: Mapping[str, Any]) -> QuantizationState:
    """The state of a module, validated.

    Raises:
        ManifestError: a part of it is damaged; the error names it.
    """
    found: QuantizationState = decode(QuantizationState, dict(state), METHOD)
    plan, activations = found.plan, len(found.plan.activations)
    inputs = [site.input for site in plan.layers.values() if site.input is not None]
    if outside := [place for place in (*inputs, *(place for _, place in plan.sites())) if place >= activations]:
        raise damage(f"{METHOD}.plan", f"places below {activations} in `activations`", str(outside[0]))
    if tuple(found.ranges.shape) != (activations, 2):
        raise damage(f"{METHOD}.ranges", f"a tensor of shape {(activations, 2)}", str(tuple(found.ranges.shape)))
    low, high = found.ranges.unbind(1)
    unseen = (low == torch.inf) & (high == -torch.inf)
    if not bool((unseen | (found.ranges.isfinite().all(1) & (low <= high))).all()):
        raise damage(f"{METHOD}.ranges", "finite ranges from low to high", "others")
    dims = {name: int(isinstance(known.spec, WeightSpec)) for name, known in learned_by(found.plan).items()}
    for name, value in found.learned.items():  # of a weight a scale per channel; else a scalar
        if name not in dims or value.ndim > dims[name]:
            raise damage(f"{METHOD}.learned[{name!r}]", "a quantization parameter in the plan", "another")
    if unknown := found.optimizer_groups.keys() - found.learned:
        raise damage(f"{METHOD}.optimizer_groups", "names of what is learned", repr(min(unknown)))
    return found


class SoundState(Rule):
    """What `begin` has written and training or `quantize` has completed, or only an example input."""

    @override
    def check(self, value: dict[str, Any], context: Context, path: str) -> None:
        check_schema(value.get("example", {}), PlainExample, f"{path}['example']")
        if value.keys() <= {"example"}:
            return
        found = read_state(value)
        modules = {op.module for op in found.plan.ops()} | found.layers.keys()
        if context.shapes is not None and (unknown := sorted(modules - context.layers)):
            raise damage(f"{path}['plan']", "names of modules of the network", repr(unknown[0]))


def begin(state: dict[str, Any], model: nn.Module, example: ExampleInput, recipe: Recipe) -> QuantizationPlan:
    """Plan the quantization of ``model``, and write a state in which nothing is observed yet."""
    trace = trace_ops(model, example.args, example.kwargs)
    plan = plan_quantization(model, trace.nodes, recipe)
    others = _other_matrices(model, trace)
    plan.left_float.update(dict.fromkeys(others, "a parameter of the network's own code, not the weight of a layer"))
    ranges = torch.tensor([[torch.inf, -torch.inf]] * len(plan.activations)).reshape(-1, 2)
    state.clear()
    state |= encode(QuantizationState(plan, ranges, recipe.engine))
    return plan


def _other_matrices(model: nn.Module, trace: Trace) -> list[str]:
    """Name the large matrices that the traced pass reads, but no operator with a quantized weight."""
    weights = [node.named["weight"] for node in trace.nodes if node.role == "layer"]
    read = {id(tensor) for call in trace.op_calls for tensor in tensors_in(call.values)}
    others = {name: model.get_parameter(name) for name in uncovered_parameters(model, Targets(), weights)}
    return [name for name, parameter in others.items() if id(parameter) in read and 1 not in parameter.shape]


def merge(state: dict[str, Any], quantizer: FakeQuantizer, seen: Tensor, momentum: Tensor) -> None:
    """Merge the ranges of one batch into those of ``state``, and quantize by them.

    Args:
        state: as `begin` has made it.
        quantizer: attached by it.
        seen: ``(activations, 2)``, of the batch.
        momentum: as in `merge_ranges`.
    """
    state["ranges"] = merge_ranges(state["ranges"].to(seen), seen, momentum.to(seen))
    state["batches"] += 1
    if not state["enabled"]:
        state["learned"] |= quantizer.observer.weight_scales
    quantizer.update(state["ranges"], state["min_bits"])


def enable(state: dict[str, Any], quantizer: FakeQuantizer) -> None:
    """Quantize from now on, with the ranges that have been observed; what is learned begins with them."""
    state["enabled"] = quantizer.enabled = True
    state["layers"] = quantizer.plan.bits_of_layers(state["min_bits"])
    state["learned"] |= initial_values(quantizer.activations, quantizer.qparams)
    quantizer.learned = state["learned"]
    quantizer.update(state["ranges"], state["min_bits"])


class LoweringQuantizer(FakeQuantizer, Quantizer):
    """A `FakeQuantizer` that exporters, who find it in the compression state, can lower to int8 operators."""

    @override
    def quantized_ops(self, call: Callable[[], Any], engine: str) -> AbstractContextManager[LoweredModel]:
        return QuantizedOpsLowering(self, engine).active(call)

    @override
    def qdq(
        self, call: Callable[[], Any], constraints: QDQConstraints, *, release_weights: bool = False
    ) -> AbstractContextManager[LoweredModel]:
        return QDQLowering(self, constraints, release_weights=release_weights).active(call)


def attach_fake_quantizer(model: nn.Module, state: dict[str, Any]) -> FakeQuantizer | None:
    """Hook ``model`` as ``state`` describes; None if there is no plan, or nothing in it.

    Args:
        model: that the plan is for.
        state: as `begin` has made it.

    Raises:
        ManifestError: ``state`` is damaged.
    """
    found = read_state(state) if state.get("plan") else None
    if found is None or not found.plan.layers:
        return None
    quantizer = LoweringQuantizer(found.plan, found.engine, found.learned if found.enabled else None)
    quantizer.update(found.ranges, found.min_bits)
    quantizer.enabled = found.enabled
    quantizer.attach(model)
    return quantizer


@validated
@contextmanager
def fake_quantized(model: nn.Module) -> Iterator[nn.Module]:
    """Fake-quantize ``model`` within a ``with`` block, in which exporters write int8 files.

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
            quantizer.remove()
