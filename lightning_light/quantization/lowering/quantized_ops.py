"""Lower to the int8 kernels of torch, which the lite interpreter runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_light.int8 import Int8Weights, LoweredModel, int8_kernels
from lightning_light.nested import map_tensors
from lightning_light.quantization.fake_quantizer import FakeQuantizer
from lightning_light.quantization.lowering.base import Lowering, QuantizedWeight
from lightning_light.quantization.op_calls import OpCall, OpId
from lightning_light.quantization.operators import KernelCall, is_view, operator_of
from lightning_light.quantization.specs import QParams

__all__ = ["QuantizedOpsLowering", "share_storage"]


class QuantizedOpsLowering(Lowering):
    """Computes one forward pass on int8 kernels, where there are some, with quantized tensors between them."""

    def __init__(self, quantizer: FakeQuantizer, engine: str) -> None:
        super().__init__(quantizer, engine)
        self._views: dict[OpId, QParams] = {}  # of quantized tensors whose view is computed in float

    @override
    @contextmanager
    def active(self, call: Callable[[], Any]) -> Iterator[LoweredModel]:
        widest = max((spec.quant_max for spec in self.quantizer.weights.values() if spec.bits == 8), default=0)
        Int8Weights(self.quantizer.engine, widest).check(self.runtime)
        with int8_kernels(self.runtime), super().active(call) as model:
            yield model

    @override
    def build(self) -> None:
        collected = self.collected
        super().build()
        # Zero points: layers with fewer channels use a part of them.
        zeros = torch.zeros(max((len(one.integers) for one in self.weights.values()), default=0), dtype=torch.int64)
        for op, weight in share_storage(self.weights).items():
            try:
                self.packed[op] = _packed(op.function, weight, collected[op], zeros)
            except (RuntimeError, NotImplementedError, AttributeError) as error:
                self.refused[op] = f"the engine has no kernel: {str(error).strip().splitlines()[0]}"

    @override
    def run(self, call: OpCall) -> Any:
        if call.id not in self.without_kernel:
            self.plan.replace_inputs(call, lambda activation, x: _quantized(x, self.qparams[activation]))
        if self.is_fused(call.id):
            return call.input
        try:
            result = None if call.id in self.refused else self._on_kernel(call)
        except (RuntimeError, NotImplementedError) as error:
            if not self.checking:
                raise
            self.refused[call.id] = f"the kernel stopped: {str(error).strip().splitlines()[0]}"
            result = None
        return self._in_float(call) if result is None else result

    @override
    def read(self, call: OpCall) -> Any:
        name = getattr(getattr(call.function, "__self__", None), "__name__", call.id.function)  # "dtype" for `x.dtype`
        if call.input.is_quantized and name in ("dtype", "is_floating_point"):
            return call.function(torch.empty(0))  # as of the floating point tensor that it stands for
        return call.run()

    @override
    def scale_of(self, output: Tensor) -> Tensor:
        return torch.tensor(output.q_scale() if output.is_quantized else 0.0, dtype=torch.float64)

    @override
    def dequantized(self, output: Any) -> Any:
        """Dequantize the tensors in ``output``."""
        return map_tensors(lambda x: x.dequantize() if x.is_quantized else x, output)

    def _on_kernel(self, call: OpCall) -> Any:
        """The result of the operator's kernel; None if there is none, or nothing that it reads is quantized."""
        operator, fused = operator_of(call.id.function), self.fused.get(call.id)
        if fused is not None:
            output = self.qparams_of_output(call.id)
            reads = call.values[0] if operator.name == "cat" else call.values[: 1 if operator.role == "layer" else 2]
            if output is None or not all(map(_is_quantized, reads)):
                raise NotImplementedError("not all that it reads is quantized")
        elif not _is_quantized(call.input):
            return None
        elif is_view(call) or call.id in self.plan.averages:
            operator, output = operator_of("view"), QParams(1.0, 0)  # the kernel keeps those of the input
        else:
            activation = self.plan.outputs.get(call.id)
            output = None if activation is None or operator.role != "unary" else self.qparams[activation]
        if operator.kernel is None or output is None:
            return None
        relu = fused is not None and fused.activation is not None
        return operator.kernel(KernelCall(call, output, self.runtime, relu, self.checking, self.packed.get(call.id)))

    def _in_float(self, call: OpCall) -> Any:
        if self.checking and _is_quantized(call.input) and is_view(call):
            self._views[call.id] = QParams(call.input.q_scale(), call.input.q_zero_point())
        call.args, call.kwargs = self.dequantized((call.args, call.kwargs))
        self.quantizer.prepare(call)
        result, activation = call.run(), self.plan.outputs.get(call.id)
        return _quantized(result, self._views.get(call.id) if activation is None else self.qparams[activation])


def _packed(function: str, weight: QuantizedWeight, named: dict[str, Any], zeros: Tensor) -> Any:
    """Pack the weight of a layer; raises what torch raises where the engine has no such kernel."""
    if weight.per_channel:
        points = zeros[: len(weight.scale)]
        integers = torch._make_per_channel_quantized_tensor(weight.integers, weight.scale, points, 0)
    else:
        integers = torch._make_per_tensor_quantized_tensor(weight.integers, float(weight.scale), 0)
    names, dims = operator_of(function).parameters[3:], weight.integers.dim() - 2
    defaults = {name: int(name in ("stride", "dilation")) for name in names if name != "groups"}
    sizes = [_listed(named.get(name, default), dims) for name, default in defaults.items()]
    groups = [named.get("groups", 1)] if names else []  # last, whatever their place is in the arguments
    return getattr(torch.ops.quantized, f"{function}_prepack")(integers, weight.bias, *sizes, *groups)


def _listed(value: Any, dims: int) -> list[int]:
    if isinstance(value, str):
        raise NotImplementedError(f"padding {value!r}")
    listed = list(value) if isinstance(value, Sequence) else [value]
    return [int(item) for item in (listed * dims if len(listed) == 1 else listed)]


def _quantized(x: Any, qparams: QParams | None) -> Any:
    """``x`` quantized; what is no floating point tensor, or was not observed, stays itself."""
    if qparams is None or not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return torch.quantize_per_tensor(x.float(), qparams.scale, qparams.zero_point, torch.quint8)


def _is_quantized(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_quantized


def share_storage(weights: Mapping[Any, QuantizedWeight]) -> dict[Any, QuantizedWeight]:
    """The same weights, whose scales per channel share one storage, and biases another.

    A `.ptl` file has a record per storage, which costs some two hundred bytes: more than the scales of 16 channels.

    Example:
        >>> two = {name: QuantizedWeight(torch.ones(2, 3), torch.rand(2).double(), torch.rand(2)) for name in "ab"}
        >>> shared = share_storage(two)
        >>> shared["b"].scale.equal(two["b"].scale), shared["b"].scale.storage_offset()
        (True, 2)
    """
    scales = _joined({key: weight.scale for key, weight in weights.items() if weight.per_channel})
    biases = _joined({key: weight.bias for key, weight in weights.items() if weight.bias is not None})
    return {
        key: replace(weight, scale=scales.get(key, weight.scale), bias=biases.get(key))
        for key, weight in weights.items()
    }


def _joined(parts: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    if not parts:
        return {}
    views = torch.split(torch.cat(list(parts.values())), [len(part) for part in parts.values()])
    return dict(zip(parts, views, strict=True))
