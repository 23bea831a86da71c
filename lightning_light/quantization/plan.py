"""Plan which tensors of a network are quantized, once for the whole network, before anything changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from lightning_light.int8 import REDUCED_MAX
from lightning_light.quantization.op_calls import OpCall, OpId
from lightning_light.quantization.operators import FLOAT
from lightning_light.quantization.recipes import Recipe
from lightning_light.quantization.specs import ActivationSpec, LayerSpec, WeightSpec
from lightning_light.quantization.trace import OpNode
from lightning_light.validation import NonNegativeInt

__all__ = ["FusedOps", "LayerSite", "QuantizationPlan", "origin_of", "plan_quantization"]

_FLOAT_ROLES = ("float", "integer", "batch_norm")


@dataclass(frozen=True)
class FusedOps:
    """Operators that one kernel computes along with its own.

    Attributes:
        last: the last of them, whose result is quantized.
        batch_norm: one that is folded into the weight.
        activation: a ReLU or ReLU6.
    """

    last: OpId
    batch_norm: OpId | None = None
    activation: OpId | None = None


@dataclass(frozen=True)
class LayerSite:
    """One call of a layer whose weight is quantized.

    Attributes:
        weight: how.
        fused: what its kernel computes along with it.
        input: which activation it reads; None: a float one, or one that is quantized for it alone.
        no_kernel: why no int8 kernel computes it; None if one does.
    """

    weight: WeightSpec
    fused: FusedOps
    input: NonNegativeInt | None = None
    no_kernel: str | None = None


@dataclass(frozen=True)
class QuantizationPlan:
    """The quantized tensors of one network.

    Attributes:
        activations: how each quantized activation is quantized; the fields below count in this list.
        outputs: operator call -> activation that its result is.
        inputs: operator call -> position of an argument -> activation; for inputs of the network, for elements of a
            tuple that an operator returns, and for layers without a kernel.
        layers: the calls of layers with a quantized weight.
        joins: sums, products and concatenations of quantized activations.
        averages: average pools whose result keeps the quantization parameters of the input.
        left_float: layers whose weights stay float, with the reason.
    """

    activations: list[ActivationSpec] = field(default_factory=list)
    outputs: dict[OpId, NonNegativeInt] = field(default_factory=dict)
    inputs: dict[OpId, dict[NonNegativeInt, NonNegativeInt]] = field(default_factory=dict)
    layers: dict[OpId, LayerSite] = field(default_factory=dict)
    joins: dict[OpId, FusedOps] = field(default_factory=dict)
    averages: list[OpId] = field(default_factory=list)
    left_float: dict[str, str] = field(default_factory=dict)

    def ops(self) -> Iterator[OpId]:
        """Every operator call that it names."""
        fused = [*(site.fused for site in self.layers.values()), *self.joins.values()]
        parts = (op for one in fused for op in (one.last, one.batch_norm, one.activation) if op is not None)
        yield from (*self.outputs, *self.inputs, *self.layers, *self.joins, *self.averages, *parts)

    def sites(self) -> Iterator[tuple[OpId, int]]:
        """Each operator call at which an activation is quantized."""
        for op, positions in self.inputs.items():
            yield from ((op, activation) for activation in positions.values())
        yield from self.outputs.items()

    def replace_inputs(self, call: OpCall, quantize: Callable[[int, Any], Any]) -> None:
        """Replace the arguments of ``call`` that are quantized for it alone by ``quantize(activation, argument)``."""
        for position, activation in self.inputs.get(call.id, {}).items():
            call.replace(position, quantize(activation, call.values[position]))

    def bits_of_layers(self, min_bits: int = 0) -> dict[str, dict[str, float]]:
        """Layer -> bits of its weight, and of its input if that is quantized: for monitors.

        Args:
            min_bits: stage of a bit-width schedule.
        """
        found: dict[str, dict[str, float]] = {}
        for op, site in self.layers.items():
            bits = found[op.module] = {"weight_bits": float(site.weight.with_min_bits(min_bits).bits)}
            read = [site.input] if site.input is not None else list(self.inputs.get(op, {}).values())
            if read:
                bits["activation_bits"] = float(self.activations[read[0]].with_min_bits(min_bits).bits)
        return found


def plan_quantization(model: nn.Module, nodes: Sequence[OpNode], recipe: Recipe) -> QuantizationPlan:
    """Plan the quantization of a traced network, so that every layer with a weight reads and writes int8.

    Batch norm and ReLU after a layer belong to it: only the result of the last of them is quantized. Sums and
    concatenations are quantized between int8 operators; a stream that float operators read, such as the residual
    stream of a transformer, stays float. Views keep the quantization parameters of their input.

    The input of a layer without a kernel is quantized for it alone, and its output is float, as in the papers.

    Args:
        model: the network.
        nodes: of one forward pass.
        recipe: how its layers are quantized.
    """
    layers = list(dict.fromkeys(node.id.module for node in nodes if node.role == "layer"))
    return _Planner(nodes, recipe.specs(model, layers), recipe.engine).run()


class _Planner:
    def __init__(self, nodes: Sequence[OpNode], specs: Mapping[str, LayerSpec], engine: str) -> None:
        self.nodes, self.plan = nodes, QuantizationPlan()
        self._specs: dict[OpNode, LayerSpec] = {}
        for node in nodes:
            if node.role == "layer" and (spec := specs.get(node.id.module)) is not None:
                weight = replace(spec.weight, per_channel=spec.weight.per_channel and node.operator.per_channel)
                if engine == "x86" and node.named.get("groups", 1) > 1:  # with VNNI too they add products in 16 bits
                    weight = weight.within(REDUCED_MAX)
                self._specs[node] = replace(spec, weight=weight)
            elif node.role == "layer":
                node.operator = FLOAT
                self.plan.left_float[node.id.module] = "excluded by the recipe"
        self._activations: dict[OpNode, int] = {}
        with_kernel = (spec.activation for spec in self._specs.values() if not spec.no_kernel)
        self._default = next((found for found in with_kernel if found is not None), ActivationSpec())

    def run(self) -> QuantizationPlan:
        for node in self.nodes:
            if node in self._specs:
                self._layer(node)
            elif node.role in ("join", "average"):
                self._join(node)
        return self.plan

    def _fused(self, node: OpNode) -> tuple[OpNode, FusedOps]:
        """The last operator that the kernel of ``node`` computes along with it, and all of them."""
        parts = node.followers(*(("batch_norm",) if self._lacks_kernel(node) else node.operator.fuses))
        tail = [node, *parts.values()][-1]
        return tail, FusedOps(tail.id, **{role: part.id for role, part in parts.items()})

    def _lacks_kernel(self, node: OpNode) -> bool:
        return node in self._specs and self._specs[node].no_kernel is not None

    def _layer(self, node: OpNode) -> None:
        ((position, source),), spec = node.inputs, self._specs[node]
        tail, fused = self._fused(node)
        if origin_of(source).role == "integer":
            self.plan.left_float[node.id.module] = "reads integers"
        elif spec.no_kernel:
            if spec.activation is not None:
                self.plan.inputs.setdefault(node.id, {})[position] = self._new_activation(source, spec.activation)
            self.plan.layers[node.id] = LayerSite(spec.weight, fused, None, spec.no_kernel)
        else:
            read = self._quantize_input(node, position, source, spec.activation)
            self.plan.layers[node.id] = LayerSite(spec.weight, fused, read)
            self.plan.outputs[tail.id] = self._activation(tail, spec.activation)

    def _join(self, node: OpNode) -> None:
        sources, (tail, fused) = [origin_of(source) for _, source in node.inputs], self._fused(node)
        if self._activations.keys().isdisjoint(sources) or any(source.role == "integer" for source in sources):
            return
        if node.operator.fuses and any(one.role in _FLOAT_ROLES or self._lacks_kernel(one) for one in _readers(tail)):
            return
        if node.operator.name == "cat" and any(map(_is_quantized_by_readers, sources)):
            return  # an element of a list is no argument of its own
        for position, source in node.inputs:
            self._quantize_input(node, position, source)
        if node.role == "join":
            self.plan.joins[node.id] = fused
            self.plan.outputs[tail.id] = self._activation(tail)
        elif sources[0] in self._activations:
            self._activations[node] = self.plan.outputs[node.id] = self._activations[sources[0]]
            self.plan.averages.append(node.id)

    def _quantize_input(self, node: OpNode, position: int, source: OpNode, spec: ActivationSpec | None = None) -> int:
        """Quantize where it is made, but at its reader if no single operator returns it alone."""
        origin = origin_of(source)
        activation = (self._new_activation if origin.returns_several else self._activation)(origin, spec)
        if _is_quantized_by_readers(origin):
            self.plan.inputs.setdefault(node.id, {})[position] = activation
        else:
            self.plan.outputs[origin.id] = activation
        return activation

    def _activation(self, node: OpNode, spec: ActivationSpec | None = None) -> int:
        """The activation that is its result; the first layer at a tensor decides how it is quantized."""
        if node not in self._activations:
            self._activations[node] = self._new_activation(node, spec)
        return self._activations[node]

    def _new_activation(self, node: OpNode, spec: ActivationSpec | None) -> int:
        """Another one, quantized as by ``spec``, with what the operator tells about its result."""
        origin, spec = origin_of(node), spec or self._default
        non_negative = _is_non_negative(origin)
        learned = "" if spec.learned == "clip" and not non_negative else spec.learned
        bounded = replace(spec, non_negative=non_negative, upper_bound=origin.operator.upper_bound, learned=learned)
        self.plan.activations.append(bounded)
        return len(self.plan.activations) - 1


def origin_of(node: OpNode) -> OpNode:
    """The node whose values these are."""
    while node.role == "view" and node.inputs:
        node = node.inputs[0][1]
    return node


def _is_quantized_by_readers(origin: OpNode) -> bool:
    """Whether no operator makes it, or one that returns several tensors: output and states of an LSTM."""
    return origin.role == "input" or origin.returns_several


def _is_non_negative(node: OpNode) -> bool:
    if (node.role == "average" or node.operator.name == "cat") and node.inputs:
        return all(_is_non_negative(origin_of(source)) for _, source in node.inputs)
    return node.operator.non_negative


def _readers(node: OpNode) -> Iterator[OpNode]:
    """The nodes that compute with its values, through views and concatenations."""
    for user in node.users:
        passes = user.role == "view" or user.operator.name == "cat"
        yield from _readers(user) if passes else [user]
