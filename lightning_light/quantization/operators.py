"""The op table: how an operator is recognized, what fuses into it, and what each runtime computes it with.

A runtime that reads QDQ graphs (ExecuTorch, ONNX Runtime) fuses what stands between a dequantize and a quantize
operation by itself, and needs an entry here only for what must share quantization parameters. The lite interpreter
calls the kernel that the entry names, and computes operators without one in float.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_light.quantization.op_calls import OpCall
from lightning_light.quantization.specs import QParams

__all__ = ["FLOAT", "INPUT", "INTEGER", "METADATA", "KernelCall", "Operator", "arguments", "is_view", "operator_of"]

Role = Literal["layer", "join", "average", "view", "unary", "batch_norm", "activation", "float", "integer", "input"]

METADATA: Final = frozenset(
    ["__get__", "size", "dim", "numel", "ndimension", "is_floating_point", "__len__", "is_contiguous"]
)
"""Functions that read a shape or a type, and no value."""


@dataclass(frozen=True)
class KernelCall:
    """One call of a kernel of the lite interpreter.

    Attributes:
        call: the operator call; what is quantized among its arguments are quantized tensors.
        output: quantization parameters of the result.
        engine: whose kernels: ``qnnpack`` or ``x86``.
        relu: whether a ReLU is fused.
        checking: whether values may be looked at, before the call is traced.
        packed: the weight of a layer.
    """

    call: OpCall
    output: QParams
    engine: str
    relu: bool
    checking: bool
    packed: Any = None

    def run(self, name: str, *arguments: Any) -> Any:
        """Call ``quantized::name``."""
        function = getattr(torch.ops.quantized, name + ("_relu" if self.relu else ""))
        return function(*arguments, self.output.scale, self.output.zero_point)


@dataclass(frozen=True)
class Operator:
    """An entry of the op table.

    Attributes:
        name: of the operator.
        functions: names of the torch functions that compute it.
        role: ``layer``: has a weight, reads and writes int8; ``join``: several int8 tensors into one; ``average`` and
            ``view``: the result keeps the quantization parameters of the input; ``unary``: int8 where a layer reads it;
            ``batch_norm`` and ``activation``: fused where they follow; the others are not quantized.
        parameters: names of the arguments, in order, where some are asked for by name.
        fuses: roles of the operators that its kernel computes along with it, in this order.
        per_channel: whether its weight may have one scale per output channel.
        non_negative: nothing in the result is below zero.
        upper_bound: of the result.
        same_qparams: runtimes in which operands must have the quantization parameters of the result.
        kernel: computes it in the lite interpreter; None: no kernel there. Raises `NotImplementedError` for options
            that the kernel lacks.
        refused: engine or runtime -> why a layer stays float there.
    """

    name: str
    functions: frozenset[str] = frozenset()
    role: Role = "float"
    parameters: tuple[str, ...] = ("input",)
    fuses: tuple[Role, ...] = ()
    per_channel: bool = True
    non_negative: bool = False
    upper_bound: float | None = None
    same_qparams: frozenset[str] = frozenset()
    kernel: Callable[[KernelCall], Any] | None = None
    refused: Mapping[str, str] = field(default_factory=dict)


def operator_of(function: str) -> Operator:
    """The entry of a torch function; `FLOAT` for what is not in the table."""
    return _BY_FUNCTION.get(function, FLOAT)


def arguments(call: OpCall) -> dict[str, Any]:
    """The arguments of a call by name."""
    names = operator_of(call.id.function).parameters
    return {**dict(zip(names, call.args, strict=False)), **call.kwargs}


def is_view(call: OpCall) -> bool:
    """Whether a call returns values of its input unchanged; padding with zeros does, every quantized range holds zero.

    So does the first addition of ``sum(branches)``, which adds 0.
    """
    function, operator = call.id.function, operator_of(call.id.function)
    if operator.name in _NEUTRAL:
        others = [value for value in call.values if not isinstance(value, Tensor)]
        is_constant = len(call.values) == 2 and len(others) == 1 and type(others[0]) in (int, float)  # no symbolic size
        return is_constant and bool(others[0] == _NEUTRAL[operator.name])
    if function == "pad":
        return call.get("mode", 2, "constant") == "constant" and not call.get("value", 3)
    return operator.role == "view"


_NEUTRAL = {"add": 0, "mul": 1}


def _layer(kernel: KernelCall) -> Any:
    return kernel.run(kernel.call.id.function, kernel.call.input, kernel.packed)


def _add(kernel: KernelCall) -> Any:
    values = kernel.call.values[:2]
    if kernel.checking and not all(2.0**-14 <= value.q_scale() / kernel.output.scale < 2.0**8 for value in values):
        # QNNPACK requantizes operands in 32 bits, and stops the process outside of these ratios.
        raise NotImplementedError("the scales of its operands are too far apart")
    return kernel.run("add", *values)


def _mul(kernel: KernelCall) -> Any:
    return kernel.run("mul", *kernel.call.values[:2])


def _cat(kernel: KernelCall) -> Any:
    return kernel.run("cat", list(kernel.call.values[0]), kernel.call.get("dim", 1, 0))


def _same(kernel: KernelCall) -> Any:
    """The torch function itself, on a quantized tensor; QNNPACK's pools ignore some options, and err."""
    call, function = kernel.call, kernel.call.id.function
    for option, (position, default) in _IGNORED.get(function, {}).items() if kernel.engine == "qnnpack" else ():
        value = call.get(option, position, default)
        if any(item != default for item in (value if isinstance(value, Sequence) else [value])):
            raise NotImplementedError(f"its kernel ignores `{option}`")
    if function == "max_pool1d" and call.args:  # on x86 one sample in channels-last order is misread
        call.args[0] = call.args[0].contiguous()
    if function in ("to", "type", "type_as", "float") and _is_cast_to_float(call):
        return call.input
    return call.run()


def _is_cast_to_float(call: OpCall) -> bool:
    """Whether a cast leaves a quantized tensor as it is: it has the values of a floating point tensor."""
    if call.id.function == "type" and len(call.values) == 1:
        raise NotImplementedError("it reads the type")
    types = [getattr(value, "dtype", value) for value in call.values[1:]]
    return all(value.is_floating_point for value in types if isinstance(value, torch.dtype))


_IGNORED: dict[str, dict[str, tuple[int, Any]]] = {
    "avg_pool2d": {"count_include_pad": (5, True), "divisor_override": (6, None)},
    "max_pool1d": {"dilation": (4, 1)},  # which errs together with padding
    "max_pool2d": {"dilation": (4, 1)},
}


def _entry(name: str, functions: str, role: Role, parameters: str = "input", **options: Any) -> Operator:
    return Operator(name, frozenset(functions.split()), role, tuple(parameters.split()), **options)


_LAYER: dict[str, Any] = {"role": "layer", "kernel": _layer, "fuses": ("batch_norm", "activation")}
_CONV = _LAYER | {"parameters": "input weight bias stride padding dilation groups"}
_TRANSPOSED = _CONV | {"parameters": "input weight bias stride padding output_padding groups dilation"}
_TRANSPOSED |= {"per_channel": False, "fuses": ()}
_WRONG_TRANSPOSED = {"x86": "the x86 kernel of transposed convolutions computes wrong numbers"}  # dozens of steps off
_NO_3D = dict.fromkeys(("qnnpack", "xnnpack"), "the engine has no kernel of 3-D convolutions")
_XNNPACK = frozenset({"xnnpack"})

TABLE: Final = (
    _entry("conv", "conv1d conv2d", **_CONV),
    _entry("conv", "conv3d", refused=_NO_3D, **_CONV),
    _entry("conv_transpose", "conv_transpose1d conv_transpose2d", refused=_WRONG_TRANSPOSED, **_TRANSPOSED),
    _entry("conv_transpose", "conv_transpose3d", refused=_WRONG_TRANSPOSED | _NO_3D, **_TRANSPOSED),
    _entry("linear", "linear", parameters="input weight bias", **_LAYER),
    _entry("batch_norm", "batch_norm", "batch_norm", " ".join(inspect.signature(F.batch_norm).parameters)),
    _entry("relu", "relu relu_", "activation", non_negative=True, same_qparams=_XNNPACK),
    _entry("relu6", "relu6", "activation", non_negative=True, upper_bound=6.0, same_qparams=_XNNPACK),
    # A clamp to [0, 6] is a ReLU6. Others are float: QNNPACK's clamp of channels-last tensors clamps all values away.
    _entry("clamp", "hardtanh hardtanh_ clamp clamp_ clip", "float", same_qparams=_XNNPACK),
    _entry("add", "add add_ __add__ __iadd__ __radd__", "join", fuses=("activation",), kernel=_add),
    _entry("mul", "mul mul_ __mul__ __imul__ __rmul__ multiply", "join", fuses=("activation",), kernel=_mul),
    _entry("cat", "cat concat concatenate", "join", same_qparams=_XNNPACK, kernel=_cat),
    _entry("average_pool", "adaptive_avg_pool1d adaptive_avg_pool2d avg_pool2d mean", "average", kernel=_same),
    _entry(
        "view",
        "flatten view reshape permute transpose squeeze unsqueeze max_pool1d max_pool2d adaptive_max_pool2d contiguous "
        "chunk split __getitem__ unflatten dropout dropout1d dropout2d dropout_ expand movedim narrow select to float "
        "type type_as detach clone pad",
        "view",
        kernel=_same,
    ),
    _entry("unary", "sigmoid hardsigmoid tanh leaky_relu leaky_relu_", "unary"),
    _entry("hardswish", "hardswish hardswish_", "unary", kernel=lambda k: k.run("hardswish", k.call.input)),
)
FLOAT: Final = Operator("float")
INTEGER: Final = Operator("integer", role="integer")
INPUT: Final = Operator("input", role="input")
_BY_FUNCTION = {function: operator for operator in TABLE for function in operator.functions}
