"""Lower a fake-quantized network: compute its forward pass with the operators of a runtime, to be traced."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_light.int8 import LoweredModel
from lightning_light.nested import tensors_in
from lightning_light.quantization.fake_quantize import columns, gain_and_shift, quantize_weight
from lightning_light.quantization.fake_quantizer import FakeQuantizer
from lightning_light.quantization.op_calls import OpCall, OpId
from lightning_light.quantization.operators import METADATA, arguments, operator_of
from lightning_light.quantization.specs import QParams, WeightSpec

__all__ = ["Lowering", "QuantizedWeight", "fold"]

_COARSEST = 256.0  # XNNPACK does not load a file with more
_MOST = 2.0**30  # of the 32 bits in which a kernel accumulates; products take the rest
_PIECE = 2**16  # values of a weight that are rounded together, in float64


class Lowering(ABC):
    """Computes a forward pass with a runtime's operators, in three rounds: collect, check, run.

    The first notes the weights and statistics of every layer. The second finds out what has no kernel and stays float.
    The third does the same again, and can be traced.

    Attributes:
        runtime: name of the engine or runtime in the op table.
        quantizer: the fake quantizer whose plan it follows.
        weights: layer call -> its weight in integers.
        packed: layer call -> its weight as a kernel reads it, where that is no tensor.
        fused: layer or join -> what its kernel computes along with it.
        refused: operator call -> why it stays float.
        without_kernel: the layers that no int8 kernel computes, in any runtime.
        collected: layer or batch norm -> its arguments by name, until every layer is folded.
        checking: whether this is the first or the second round.
        reads: parameter -> how many operator calls of the first round read it.
    """

    def __init__(self, quantizer: FakeQuantizer, runtime: str) -> None:
        self.runtime, self.quantizer = runtime, quantizer
        self.plan, self.qparams = quantizer.plan, quantizer.qparams
        self.weights: dict[OpId, QuantizedWeight] = {}
        self.packed: dict[OpId, Any] = {}
        self.refused = {op: site.no_kernel for op, site in self.plan.layers.items() if site.no_kernel}
        self.without_kernel = frozenset(self.refused)
        self.checking = True
        self._collecting = True
        self._output_scales: Any = None
        self.reads: Counter[nn.Parameter] = Counter()
        self.collected: dict[OpId, dict[str, Any]] = {}
        self.fused = {op: site.fused for op, site in self.plan.layers.items()} | self.plan.joins
        self._heads = {part: op for op, ops in self.fused.items() for part in (ops.batch_norm, ops.activation) if part}

    @contextmanager
    def active(self, call: Callable[[], Any]) -> Iterator[LoweredModel]:
        """Inside, a forward pass of the quantizer's network is computed by this lowering.

        Args:
            call: one forward pass in evaluation mode, of the network that the quantizer is attached to.
        """
        try:
            self.quantizer.lowering = self
            with torch.no_grad():
                call()
                self.build()
                call()
            self.checking = False
            yield self.description()
        finally:
            self.quantizer.reset()
            self.quantizer.lowering = None

    def handle(self, call: OpCall) -> Any:
        """Compute one operator call."""
        if self._collecting:
            if call.id in self.plan.layers or operator_of(call.id.function).role == "batch_norm":
                self.collected[call.id] = arguments(call)
            self.reads.update(value for value in tensors_in(call.values) if isinstance(value, nn.Parameter))
            return self.quantizer.compute(call)
        return self.read(call) if call.id.function in METADATA else self.run(call)

    def build(self) -> None:
        """Fold every layer, and go on to the second round."""
        for op in self.plan.layers:
            if op not in self.refused and (reason := self.fold_layer(op)):
                self.refused[op] = reason
        self.collected, self._collecting = {}, False

    def fold_layer(self, op: OpId) -> str | None:
        """Fold a layer, or give the reason why it stays float.

        XNNPACK accepts an int8 layer whose input is float, and computes wrong values.
        """
        site, writes = self.plan.layers[op], self.qparams_of_output(op)
        reads = None if site.input is None else self.qparams[site.input]
        if (reason := operator_of(op.function).refused.get(self.runtime)) is not None:
            return reason
        if op not in self.collected:
            return "the forward pass did not call it"
        if reads is None or writes is None:
            return f"its {'output' if writes is None else 'input'} was never observed"
        norm = None if site.fused.batch_norm is None else self.collected[site.fused.batch_norm]
        weight = fold(self.collected[op], norm, *self.quantizer.weight(op), reads.scale, writes.scale)
        if reads.scale * float(weight.scale.max()) >= _COARSEST * writes.scale:
            return "one step of its sums is more than the whole range of its output"
        self.weights[op] = weight
        return None

    @abstractmethod
    def run(self, call: OpCall) -> Any:
        """Compute one operator call, in the second and the third round."""

    def read(self, call: OpCall) -> Any:
        """Read a shape or a type."""
        return call.run()

    @abstractmethod
    def scale_of(self, output: Tensor) -> Tensor:
        """The scale of an output of the network, a scalar in float64; 0 if it is not quantized."""

    def output(self, output: Any) -> Any:
        """The outputs of the network, in float; None leaves them as they are."""
        if self._collecting:
            return None
        if self.checking:
            self._output_scales = tree_map_only(Tensor, self.scale_of, output)
        return self.dequantized(output)

    def dequantized(self, value: Any) -> Any:
        """Tensors of the runtime, or a container of some, in float."""
        return value

    def description(self) -> LoweredModel:
        """What an exporter has to know."""
        layers = [op for op in self.weights if op not in self.refused]
        refused = {op.module: reason for op, reason in self.refused.items() if op in self.plan.layers}
        return LoweredModel(
            packed=[self.packed[op] for op in layers if op in self.packed],
            output_scales=self._output_scales,
            layers=len(layers),
            left_float={**self.plan.left_float, **refused},
            modules=frozenset(op.module for op in layers),
        )

    def is_fused(self, op: OpId) -> bool:
        """Whether the kernel of an earlier call has computed this one."""
        return op in self._heads and self._heads[op] not in self.refused

    def qparams_of_output(self, op: OpId) -> QParams | None:
        """Of an operator call, after what is fused into it; None where its result is not quantized."""
        last = self.fused[op].last if op in self.fused else op
        return self.qparams[self.plan.outputs[last]] if last in self.plan.outputs else None


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """``integers * scale`` is the fake-quantized weight, times the gain of the batch norm.

    Attributes:
        integers: int8, the shape of the weight.
        scale: float64; one per output channel (the first dimension), or a scalar.
        bias: float32, or None.
    """

    integers: Tensor
    scale: Tensor
    bias: Tensor | None

    @property
    def per_channel(self) -> bool:
        """Whether there is one scale per channel."""
        return self.scale.dim() > 0


def fold(
    named: Mapping[str, Any],
    norm: Mapping[str, Any] | None,
    spec: WeightSpec,
    scale: Tensor | None,
    reads: float,
    writes: float,
) -> QuantizedWeight:
    """Quantize a weight as in training, and multiply its scales by the gain of the batch norm after it.

    A kernel counts the bias in steps of ``reads * scale``, in 32 bits, and multiplies by ``reads * scale / writes`` in
    the end. Where the scale is too small for that, as in an almost dead channel, it becomes the smallest one that fits,
    with fewer steps for the weight: what is lost is far below a step of the output.

    Args:
        named: arguments of the layer by name.
        norm: arguments of the batch norm, or None.
        spec: how the weight is quantized.
        scale: of the weight, if that is learned.
        reads: scale of the layer's input.
        writes: scale of its output.
    """
    bias = named.get("bias")
    bias = None if bias is None else bias.detach().float()
    integers, found = quantize_weight(named["weight"], spec, scale)
    found = found.double()
    if norm is not None:
        gain, shift = gain_and_shift(norm, bias)
        integers, found, bias = integers.mul_(columns(gain.sign().float(), integers)), found * gain.abs(), shift.float()
    most = torch.full_like(found, writes)
    if bias is not None:
        largest = bias.double().abs()
        most = torch.maximum(most, largest if found.dim() else largest.amax())
    fitting = torch.maximum(found, most / (_MOST * reads))
    return QuantizedWeight(_rounded(integers, found / fitting), fitting, bias)


def _rounded(integers: Tensor, factor: Tensor) -> Tensor:
    """``round(integers * factor)``, computed in float64 by pieces, which need less memory than the whole weight."""
    found = torch.empty_like(integers, dtype=torch.int8)
    rows = max(_PIECE * len(integers) // max(integers.numel(), 1), 1)
    factors = torch.split(factor, rows) if factor.dim() else (factor,) * len(integers)
    for target, piece, one in zip(torch.split(found, rows), torch.split(integers, rows), factors, strict=False):
        target.copy_((piece * columns(one, piece)).round_())
    return found
