"""Lower to the int8 kernels of torch, which the lite interpreter runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_light.int8 import Int8Weights, LoweredModel
from lightning_light.nested import map_tensors
from lightning_light.quantization.fake_quantizer import FakeQuantizer
from lightning_light.quantization.lowering.base import Lowering, scalar
from lightning_light.quantization.lowering.weights import QuantizedWeight, share_storage
from lightning_light.quantization.op_calls import OpCall, OpId
from lightning_light.quantization.operators import KernelCall, is_view, operator_of
from lightning_light.quantization.specs import QParams

__all__ = ["QuantizedOpsLowering", "quantized_engine"]

_VIEW = operator_of("view")


@contextmanager
def quantized_engine(
    quantizer: FakeQuantizer, lowering: AbstractContextManager[LoweredModel], engine: str
) -> Iterator[LoweredModel]:
    """Enter ``lowering`` with the kernels of ``engine``, if the weights fit them.

    Raises:
        UnsupportedError: the weights are quantized for an engine with a wider range.
    """
    widest = max((spec.quant_max for spec in quantizer.weights.values() if spec.bits == 8), default=0)
    Int8Weights(quantizer.engine, widest).check(engine)
    before = torch.backends.quantized.engine
    try:
        torch.backends.quantized.engine = engine
        with lowering as model:
            yield model
    finally:
        torch.backends.quantized.engine = before


class QuantizedOpsLowering(Lowering):
    """Computes one forward pass on int8 kernels, where there are some, with quantized tensors between them.

    Attributes:
        layers: layer call -> its kernel.
    """

    def __init__(self, quantizer: FakeQuantizer, engine: str) -> None:
        super().__init__(quantizer, engine)
        self.layers: dict[OpId, _PackedLayer] = {}
        self._views: dict[OpId, QParams] = {}  # of quantized tensors whose view is computed in float

    @cached_property
    def _shared(self) -> dict[OpId, QuantizedWeight]:
        return share_storage(self.weights)

    @cached_property
    def _zeros(self) -> Tensor:
        """The zero points of every layer's channels: the layer with the most needs all of them."""
        return torch.zeros(max(len(weight.integers) for weight in self.weights.values()), dtype=torch.int64)

    @override
    def prepare(self, op: OpId, named: dict[str, Any]) -> str | None:
        qparams = self.qparams_of_output(op)
        assert qparams is not None  # `build` has refused the others
        kernel = op.function + ("_relu" if self.plan.layers[op].fused.activation is not None else "")
        try:
            packed = _packed(op.function, self._shared[op], named, self._zeros)
            self.layers[op] = _PackedLayer(getattr(torch.ops.quantized, kernel), packed, qparams)
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            return f"the engine has no kernel: {str(error).strip().splitlines()[0]}"
        return None

    @override
    def run(self, call: OpCall) -> Any:
        site = self.plan.layers.get(call.id)
        for position, activation in self.plan.inputs.get(call.id, {}).items():
            qparams = self.qparams[activation]
            if qparams is not None and not (site is not None and site.no_kernel):
                call.replace(position, _quantized(call.values[position], qparams))
        if self.is_fused(call.id):
            return call.input
        if call.id not in self.refused:
            try:
                result = self._on_kernel(call)
            except (RuntimeError, NotImplementedError) as error:
                if not self.checking:
                    raise
                self.refused[call.id] = f"the kernel stopped: {str(error).strip().splitlines()[0]}"
            else:
                if result is not None:
                    return result
        return self._in_float(call)

    @override
    def read(self, call: OpCall) -> Any:
        if call.input.is_quantized and call.reads in ("dtype", "is_floating_point"):
            return call.function(torch.empty(0))  # as of the floating point tensor that it stands for
        return call.run()

    @override
    def description(self) -> LoweredModel:
        found = super().description()
        found.packed = [layer.packed for op, layer in self.layers.items() if op not in self.refused]
        return found

    @override
    def scale_of(self, leaf: Tensor) -> Tensor:
        return scalar(leaf.q_scale() if leaf.is_quantized else 0.0)

    @override
    def dequantized(self, output: Any) -> Any:
        return _dequantized(output)

    def _on_kernel(self, call: OpCall) -> Any:
        """The result of the operator's kernel; None if there is none, or nothing that it reads is quantized."""
        if call.id in self.layers:
            if not call.input.is_quantized:
                raise NotImplementedError("its input is not quantized")
            return self.layers[call.id](call.input)
        operator, relu, activation = operator_of(call.id.function), False, self.plan.outputs.get(call.id)
        output = None if activation is None else self.qparams[activation]
        if call.id in self.plan.joins:
            output = self.qparams_of_output(call.id)
            operands = call.values[0] if operator.name == "cat" else call.values[:2]
            if output is None or not all(isinstance(value, Tensor) and value.is_quantized for value in operands):
                raise NotImplementedError("not all of its operands are quantized")
            relu = self.plan.joins[call.id].activation is not None
        elif not (isinstance(call.input, Tensor) and call.input.is_quantized):
            return None
        elif is_view(call) or call.id in self.plan.averages:
            operator, output = _VIEW, QParams(1.0, 0)  # the kernel keeps those of the input
        elif operator.role != "unary":
            return None
        if operator.kernel is None or output is None:
            return None
        return operator.kernel(KernelCall(call, output, self.runtime, relu, self.checking))

    def _in_float(self, call: OpCall) -> Any:
        first = call.input
        if self.checking and isinstance(first, Tensor) and first.is_quantized and is_view(call):
            self._views[call.id] = QParams(first.q_scale(), first.q_zero_point())
        call.args, call.kwargs = _dequantized(call.args), _dequantized(call.kwargs)
        self.quantizer.prepare(call)
        result, activation = call.run(), self.plan.outputs.get(call.id)
        qparams = self._views.get(call.id) if activation is None else self.qparams[activation]
        if qparams is None or not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        return _quantized(result, qparams)


@dataclass
class _PackedLayer:
    """A layer with its batch norm folded, its weight packed, and the quantization parameters of its output."""

    kernel: Any
    packed: Any
    output: QParams

    def __call__(self, x: Tensor) -> Any:
        return self.kernel(x, self.packed, self.output.scale, self.output.zero_point)


def _packed(function: str, weight: QuantizedWeight, named: dict[str, Any], zeros: Tensor) -> Any:
    """Pack the weight of a layer; raises what torch raises where the engine has no such kernel."""
    if weight.per_channel:
        points = zeros[: len(weight.scale)]
        integers = torch._make_per_channel_quantized_tensor(weight.integers, weight.scale, points, 0)
    else:
        integers = torch._make_per_tensor_quantized_tensor(weight.integers, float(weight.scale), 0)
    names = operator_of(function).parameters[3:]
    packing: list[Any] = [integers, weight.bias]
    for name in names:
        if name != "groups":
            default = int(name in ("stride", "dilation"))
            packing.append(_listed(named.get(name, default), weight.integers.dim() - 2))
    if names:
        packing.append(named.get("groups", 1))  # last, whatever their place is in the arguments
    return getattr(torch.ops.quantized, f"{function}_prepack")(*packing)


def _listed(value: Any, dims: int) -> list[int]:
    if isinstance(value, str):
        raise NotImplementedError(f"padding {value!r}")
    listed = list(value) if isinstance(value, Sequence) else [value]
    return [int(item) for item in (listed * dims if len(listed) == 1 else listed)]


def _quantized(x: Tensor, qparams: QParams) -> Tensor:
    scale, zero_point, _ = qparams
    return x if x.is_quantized else torch.quantize_per_tensor(x.float(), scale, zero_point, torch.quint8)


def _dequantized(value: Any) -> Any:
    """Quantized tensors in ``value``, dequantized."""
    return map_tensors(lambda x: x.dequantize() if x.is_quantized else x, value)
