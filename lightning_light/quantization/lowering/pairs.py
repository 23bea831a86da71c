"""The plan written into the graph: each rounding is a quantize and a dequantize operation, weights are int8."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from typing_extensions import override

from lightning_light.errors import UnsupportedError
from lightning_light.int8 import PairRules
from lightning_light.quantization.learning import SMALLEST
from lightning_light.quantization.lowering.lowered import ASKS, Lowered, Rounds, scalar
from lightning_light.quantization.lowering.weights import Scale, Weight
from lightning_light.quantization.operations import BATCH_NORM, kind_of, moves
from lightning_light.quantization.rounding import integers

__all__ = ["Pairs", "check_pairs"]

_OPERATIONS = "torch.ao.quantization.fx._decomposed"
_SIGNED = -128
_HIGHEST = 255
_LIMIT = 127


class Pairs(Lowered):
    """Computes one forward pass with the operations that runtimes know by sight: ``quantized_decomposed``.

    A layer reads its weight from int8 constants, with the batch norm folded; a number that is on a grid is quantized
    once, and dequantized anew for each reader, so that a runtime can take every layer with what belongs to it.
    """

    def __init__(self, attachment: Rounds, rules: PairRules) -> None:
        super().__init__(attachment)
        self.rules = rules
        self._constants: dict[
            str, tuple[Any, ...]
        ] = {}  # made once: a runtime looks for constants, not for what makes them
        self._values: dict[str, Tensor] = {}  # rounded weights of layers that stay float
        self._quantized: dict[int, tuple[Tensor, Tensor, Scale]] = {}  # by identity: itself, whole numbers, grid

    @override
    def _prepare(self, key: str, name: str, args: Mapping[str, Any]) -> None:
        if (dtype := args["weight"].dtype) is not torch.float32:
            self.refused[key] = f"its weight is {dtype}, and the runtimes compute in torch.float32: `module.float()`"
            return
        weight, rest = self.weights[key], (-_LIMIT, _LIMIT, torch.int8)
        if weight.per_channel:
            zeros = torch.zeros_like(weight.scale, dtype=torch.int64)
            self._constants[key] = (weight.integers, weight.scale.float(), zeros, 0, *rest)
        else:
            self._constants[key] = (weight.integers, float(weight.scale), 0, *rest)

    @override
    def run(self, key: str, name: str, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if name in ASKS:
            return function(*args, **kwargs)
        first: Any = args[0] if args else kwargs.get("input")
        known = self._quantized.get(id(first)) if moves(name, args, kwargs) else None
        if _writes(name, kwargs):
            self._quantized.pop(id(first), None)  # it is the result from here on
        else:
            args, kwargs = self._read(args), self._read(kwargs)
        if key in self.refused:
            self._in_float(key, args, kwargs)
        if key not in self.plan.without_kernel:
            self._take_in(key, args, kwargs)
        if kind_of(name) == BATCH_NORM and self._is_done_by_its_layer(key):
            result = args[0]
        elif key in self.weights and key not in self.refused:
            result = self._layer(key, function, args, kwargs)
        else:
            result = function(*self._joined(key, name, args), **kwargs)
        grid = self.plan.outputs.get(key)
        scale = known[2] if grid is None and known is not None else None if grid is None else self.scales[grid]
        return result if scale is None else tree_map(lambda leaf: self._on_grid(leaf, scale), result)

    @override
    def _scale_at(self, leaf: Tensor) -> Tensor:
        known = self._quantized.get(id(leaf))
        return scalar(0.0 if known is None else known[2][0])

    @override
    def _in_the_end(self, output: Any) -> Any:
        self._quantized = {}
        return output

    def _layer(self, key: str, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        weight, ops = self.weights[key], torch.ops.quantized_decomposed
        dequantize = ops.dequantize_per_channel if weight.per_channel else ops.dequantize_per_tensor
        named = {"weight": dequantize.default(*self._constants[key]), "bias": weight.bias}
        for place, name in ((1, "weight"), (2, "bias")):
            if len(args) > place:
                args[place] = named[name]
            else:
                kwargs[name] = named[name]
        return function(*args, **kwargs)

    def _in_float(self, key: str, args: list[Any], kwargs: dict[str, Any]) -> None:
        """A layer without a kernel: its weight is the rounded one, and what it reads is rounded by plain operations."""
        if key not in self._values:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            whole, scale = integers(weight, *self.attachment.weight(key))
            self._values[key] = Weight(whole.to(torch.int8), scale.double(), None).value().to(weight.dtype)
        if len(args) > 1:
            args[1] = self._values[key]
        else:
            kwargs["weight"] = self._values[key]
        for place, grid in self.plan.arguments.get(key, {}).items() if key in self.plan.without_kernel else ():
            if place < len(args):
                args[place] = self._rounded(grid, args[place])
            else:
                name = list(kwargs)[place - len(args)]
                kwargs[name] = self._rounded(grid, kwargs[name])

    def _rounded(self, grid: int, x: Tensor) -> Tensor:
        scale, found = self.scales[grid], self.attachment.grids[grid]
        if found.at_run_time:  # as `round_at_run_time`, with operations that ONNX has
            low, top = x.min().clamp_max(0.0), x.max().clamp_min(0.0)
            step = ((top - low) / found.high).clamp_min(SMALLEST)
            zero = (-low / step).round()
            return torch.minimum(torch.maximum((x / step).round(), -zero), found.high - zero) * step
        return x if scale is None else (x / scale[0]).round().clamp(-scale[1], found.high - scale[1]) * scale[0]

    def _take_in(self, key: str, args: list[Any], kwargs: dict[str, Any]) -> None:
        for place, grid in self.plan.arguments.get(key, {}).items():
            scale = self.scales[grid]
            if scale is not None and place < len(args):
                args[place] = self._on_grid(args[place], scale)
            elif scale is not None:
                name = list(kwargs)[place - len(args)]
                kwargs[name] = self._on_grid(kwargs[name], scale)

    def _joined(self, key: str, name: str, args: list[Any]) -> list[Any]:
        """What is concatenated, on the grid of the result, if the runtime wants it so."""
        grid = self.plan.outputs.get(key)
        scale = None if grid is None else self.scales[grid]
        if kind_of(name) != "cat" or scale is None or not self.rules.join_on_one_grid:
            return args
        return [[self._on_grid(value, scale) for value in args[0]], *args[1:]]

    def _on_grid(self, x: Any, scale: Scale) -> Any:
        """``x`` rounded; what is no floating point tensor stays itself."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        grid = self._grid(scale)
        whole = torch.ops.quantized_decomposed.quantize_per_tensor.default(_in(torch.float32, x), *grid)
        return self._known(whole, scale, x.dtype)

    def _known(self, whole: Tensor, scale: Scale, dtype: torch.dtype) -> Tensor:
        """Whole numbers on a grid, dequantized."""
        result = _in(dtype, torch.ops.quantized_decomposed.dequantize_per_tensor.default(whole, *self._grid(scale)))
        self._quantized[id(result)] = result, whole, scale
        return result

    def _read(self, value: Any) -> Any:
        """Every number that is on a grid, dequantized for this reader alone."""
        if isinstance(value, Tensor) and id(value) in self._quantized:
            _, whole, scale = self._quantized[id(value)]
            ops = torch.ops.quantized_decomposed
            return _in(value.dtype, ops.dequantize_per_tensor.default(whole, *self._grid(scale)))
        if isinstance(value, Mapping):
            return {key: self._read(item) for key, item in value.items()}
        return type(value)(map(self._read, value)) if type(value) in (list, tuple) else value

    def _grid(self, scale: Scale) -> tuple[float, int, int, int, torch.dtype]:
        step, zero = scale
        if self.rules.signed:
            return step, zero + _SIGNED, _SIGNED, _HIGHEST + _SIGNED, torch.int8
        return step, zero, 0, _HIGHEST, torch.uint8


def _in(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x if x.dtype is dtype else x.to(dtype)  # which is an operation of its own, also where it changes nothing


def _writes(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation writes into what it is given, which then must stay what the network holds."""
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name == "__setitem__" or bool(kwargs.get("inplace")) or "out" in kwargs


def check_pairs() -> None:
    """Register the operations.

    Raises:
        UnsupportedError: this torch has dropped them.
    """
    operation = getattr(torch.ops.quantized_decomposed, "quantize_per_tensor", None)
    if hasattr(operation, "default"):  # ExecuTorch registers variants of its own, also before torch does the rest
        return
    try:
        importlib.import_module(_OPERATIONS)
    except ImportError as error:
        raise UnsupportedError(
            f"int8 with torch {torch.__version__}: expected the operations `quantized_decomposed` ({_OPERATIONS}), "
            f"found that this release has dropped them ({error}). Install `torch<2.16`, or write a float file: export "
            "outside of `fake_quantized`."
        ) from error
