"""Lower to a QDQ graph: each quantization is a quantize and a dequantize operation, and weights are int8 constants."""

from __future__ import annotations

import importlib
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import override

from lightning_light.errors import UnsupportedError
from lightning_light.int8 import QDQConstraints
from lightning_light.quantization.fake_quantize import fake_quantize_weight, gain_and_shift
from lightning_light.quantization.fake_quantizer import FakeQuantizer
from lightning_light.quantization.lowering.base import Lowering
from lightning_light.quantization.op_calls import OpCall, OpId
from lightning_light.quantization.operators import arguments, is_view, operator_of
from lightning_light.quantization.specs import QParams

__all__ = ["QDQLowering", "register_operations"]

_OPERATIONS = "torch.ao.quantization.fx._decomposed"
_WEIGHT_MAX = 127


class QDQLowering(Lowering):
    """Computes one forward pass with the operations ``quantized_decomposed``, which the runtimes recognize.

    A layer reads its weight from int8 constants, with the batch norm folded; an activation is quantized once, and
    dequantized for each reader of its own, so that a runtime can fuse every operator with what belongs to it.

    Args:
        quantizer: the fake quantizer whose plan it follows.
        constraints: of the runtime.
        release_weights: whether the memory of each weight is released as soon as it exists in integers.
    """

    def __init__(self, quantizer: FakeQuantizer, constraints: QDQConstraints, *, release_weights: bool) -> None:
        super().__init__(quantizer, constraints.runtime)
        register_operations()
        self.constraints, self._release_weights = constraints, release_weights
        self._constants: dict[OpId, Any] = {}  # of layers and batch norms, made once: a runtime looks for constants
        self._quantized: MutableMapping[Tensor, tuple[Tensor, QParams]] = WeakIdKeyDictionary()  # tensor -> integers

    @override
    def fold_layer(self, op: OpId) -> str | None:
        if (reason := super().fold_layer(op)) is not None:
            return reason
        weight, plain = self.weights[op], self.collected[op]["weight"]
        if plain.dtype is not torch.float32:
            return f"its weight is {plain.dtype}, and the runtimes compute in torch.float32: `module.float()`"
        if self._release_weights and self.reads[plain] == 1:
            plain.data = plain.data.new_empty(0)
        points = torch.zeros_like(weight.scale, dtype=torch.int64)
        qparams = (weight.scale.float(), points, 0) if weight.per_channel else (float(weight.scale), 0)
        self._constants[op] = (weight.integers, *qparams, -_WEIGHT_MAX, _WEIGHT_MAX, torch.int8)
        return None

    @override
    def run(self, call: OpCall) -> Any:
        known, is_norm = self._known(call.input), operator_of(call.id.function).role == "batch_norm"
        kept = known[1] if known is not None and is_view(call) else None
        if not _writes(call):
            call.args, call.kwargs = tree_map(self._read, (call.args, call.kwargs))
        elif known is not None:
            del self._quantized[call.input]  # from here on it is the result
        if is_norm and self.is_fused(call.id):
            result = call.input
        elif is_norm and known is not None and self.runtime == "xnnpack" and call.get("running_var", 2) is not None:
            result = self._normalized(call)
        else:
            self._set_operands(call)
            result = call.run()
        qparams = self.qparams[self.plan.outputs[call.id]] if call.id in self.plan.outputs else kept
        return result if qparams is None else tree_map(lambda leaf: self._qdq(leaf, qparams), result)

    @override
    def scale_of(self, output: Tensor) -> Tensor:
        known = self._known(output)
        return torch.tensor(0.0 if known is None else known[1].scale, dtype=torch.float64)

    def _known(self, x: Any) -> tuple[Tensor, QParams] | None:
        """Integers and quantization parameters of a quantized tensor."""
        return self._quantized.get(x) if isinstance(x, Tensor) else None

    def _set_operands(self, call: OpCall) -> None:
        """Quantize the inputs that only this operator reads, its weight, and what must have the scale of the result."""
        site, ops = self.plan.layers.get(call.id), torch.ops.quantized_decomposed
        if call.id in self.without_kernel:  # by plain operators, which no runtime fuses
            self.plan.replace_inputs(call, self.quantizer.quantize)
        else:
            self.plan.replace_inputs(call, lambda activation, x: self._qdq(x, self.qparams[activation]))
        if site is not None and call.id in self.refused:
            how = self.quantizer.weight(call.id)
            weight = self._constant(call.id, lambda: fake_quantize_weight(call.get("weight", 1), *how)[0].detach())
            call.set("weight", 1, weight)
        elif site is not None:
            integers = self.weights[call.id]
            dequantize = ops.dequantize_per_channel if integers.per_channel else ops.dequantize_per_tensor
            call.set("weight", 1, dequantize.default(*self._constants[call.id]))
            call.set("bias", 2, integers.bias)
        elif self.runtime in operator_of(call.id.function).same_qparams and not self.is_fused(call.id):
            output = self.qparams_of_output(call.id)
            operand = tree_map(lambda x: self._qdq(x, output), call.values[0])
            if _writes(call):
                call.run()  # for other readers
            call.replace(0, operand)

    def _constant(self, op: OpId, make: Callable[[], Any]) -> Any:
        if op not in self._constants:
            self._constants[op] = make()
        return self._constants[op]

    def _normalized(self, call: OpCall) -> Tensor:
        """By a product and a sum: ExecuTorch makes a convolution of a batch norm, and fails if its input is int8."""
        shape, x = (-1, *[1] * (call.input.dim() - 2)), call.input
        gain, shift = self._constant(call.id, lambda: [v.to(x).reshape(shape) for v in gain_and_shift(arguments(call))])
        return x * gain + shift  # type: ignore[no-any-return]

    def _qdq(self, x: Any, qparams: QParams | None) -> Any:
        """Quantize and dequantize ``x``; what is no floating point tensor, or was not observed, stays itself."""
        if qparams is None or not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        ops, rest = torch.ops.quantized_decomposed, self._arguments(qparams)
        integers = ops.quantize_per_tensor.default(_cast(torch.float32, x), *rest)
        result = _cast(x.dtype, ops.dequantize_per_tensor.default(integers, *rest))
        self._quantized[result] = integers, qparams
        return result

    def _read(self, x: Any) -> Any:
        """A quantized tensor, dequantized for this reader alone."""
        if (known := self._known(x)) is None:
            return x
        dequantize = torch.ops.quantized_decomposed.dequantize_per_tensor.default
        return _cast(x.dtype, dequantize(known[0], *self._arguments(known[1])))

    def _arguments(self, qparams: QParams) -> tuple[float, int, int, int, torch.dtype]:
        dtype = torch.int8 if self.constraints.signed else torch.uint8
        low, top = torch.iinfo(dtype).min, torch.iinfo(dtype).max
        return qparams.scale, qparams.zero_point + low, low, top, dtype


def _cast(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x if x.dtype is dtype else x.to(dtype)  # which is traced as an operation even where it changes nothing


def _writes(call: OpCall) -> bool:
    """Whether an operator writes into its input, which must stay the tensor that the network holds."""
    name = call.id.function
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name == "__setitem__" or bool(call.kwargs.get("inplace")) or "out" in call.kwargs


def register_operations() -> None:
    """Register the operations ``quantized_decomposed``.

    Raises:
        UnsupportedError: this torch has dropped them.
    """
    # ExecuTorch registers variants of its own, also before torch does the rest.
    if hasattr(getattr(torch.ops.quantized_decomposed, "quantize_per_tensor", None), "default"):
        return
    try:
        importlib.import_module(_OPERATIONS)
    except ImportError as error:
        raise UnsupportedError(
            f"int8 with torch {torch.__version__}: expected the operations `quantized_decomposed` ({_OPERATIONS}), "
            f"found that this release has dropped them ({error}). Install `torch<2.16`, or write a float file: export "
            "outside of `fake_quantized`."
        ) from error
