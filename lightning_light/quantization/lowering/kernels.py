"""The engines' int8 kernels: which operation becomes which, and what they cannot do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_light.quantization.lowering.weights import Scale, Weight

__all__ = ["Layer", "add_fits", "join", "kept", "quantize", "tensors_to_float"]


@dataclass
class Layer:
    """A layer with its batch norm folded, its weight packed, and its output grid.

    Attributes:
        run: the kernel.
        packed: the engine's form of the weight.
        scale: of the output.
    """

    run: Any
    packed: Any
    scale: Scale

    def __call__(self, x: Tensor) -> Any:
        """The whole group: layer, batch norm, ReLU, rounding."""
        return self.run(x, self.packed, *self.scale)

    @classmethod
    def of(
        cls, name: str, weight: Weight, args: Mapping[str, Any], *, relu: bool, scale: Scale, zeros: Tensor
    ) -> Layer:
        """Pack the weight.

        Args:
            name: of the operation: ``conv2d``.
            weight: with the batch norm folded.
            args: the arguments of the operation by name.
            relu: whether one follows; it costs nothing, since nothing below zero is on the grid then.
            scale: of the output.
            zeros: the zero points of at least as many channels as the weight has; layers may share them.

        Raises:
            RuntimeError: the engine has no such kernel.
            NotImplementedError: likewise.
        """
        packed_weight, ops = _quantized(weight, zeros), torch.ops.quantized
        suffix = "_relu" if relu else ""
        if name == "linear":
            return cls(getattr(ops, f"linear{suffix}"), ops.linear_prepack(packed_weight, weight.bias), scale)
        dims = weight.integers.dim() - 2
        geometry = [_listed(args.get(key, usual), dims) for key, usual in _GEOMETRY[name.startswith("conv_t")]]
        pack = getattr(ops, f"{name}_prepack")
        packed = pack(packed_weight, weight.bias, *geometry, args.get("groups", 1))
        return cls(getattr(ops, name + suffix), packed, scale)


_GEOMETRY: dict[bool, list[tuple[str, int]]] = {
    False: [("stride", 1), ("padding", 0), ("dilation", 1)],
    True: [("stride", 1), ("padding", 0), ("output_padding", 0), ("dilation", 1)],
}


def _listed(value: Any, dims: int) -> list[int]:
    if isinstance(value, str):
        raise NotImplementedError(f"padding {value!r}")
    listed = list(value) if isinstance(value, Sequence) else [value]
    return [int(item) for item in (listed * dims if len(listed) == 1 else listed)]


def _quantized(weight: Weight, zeros: Tensor) -> Tensor:
    if not weight.per_channel:
        return torch._make_per_tensor_quantized_tensor(weight.integers, float(weight.scale), 0)
    return torch._make_per_channel_quantized_tensor(weight.integers, weight.scale, zeros[: len(weight.scale)], 0)


def quantize(x: Tensor, scale: Scale) -> Tensor:
    """A float tensor on a grid; one that is quantized is on it already."""
    return x if x.is_quantized else torch.quantize_per_tensor(x.float(), scale[0], scale[1], torch.quint8)


def add_fits(values: Sequence[Tensor], scale: Scale) -> bool:
    """QNNPACK adds in 32 bits: an operand's scale over the sum's must be in [2**-14, 2**8), or it stops the process."""
    return all(2.0**-14 <= value.q_scale() / scale[0] < 2.0**8 for value in values)


def kept(engine: str, name: str, function: Any, args: list[Any], kwargs: Mapping[str, Any]) -> Any:
    """What moves or pools quantized numbers, which stay on their grid.

    Raises:
        NotImplementedError: QNNPACK's pool does not look at an option, and so computes wrong numbers.
    """
    for option, (place, usual) in _IGNORED.get(name, {}).items() if engine == "qnnpack" else ():
        value = kwargs.get(option, args[place] if len(args) > place else usual)
        if any(item != usual for item in (value if isinstance(value, Sequence) else [value])):
            raise NotImplementedError(f"its pool ignores `{option}`")
    if name == "max_pool1d" and args:  # on x86 one sample whose channels lie last in memory is read in the wrong order
        args = [args[0].contiguous(), *args[1:]]
    return function(*args, **kwargs)


_IGNORED: dict[str, dict[str, tuple[int, Any]]] = {
    "avg_pool2d": {"count_include_pad": (5, True), "divisor_override": (6, None)},
    "max_pool1d": {"dilation": (4, 1)},  # which goes wrong together with padding
    "max_pool2d": {"dilation": (4, 1)},
}


def join(name: str, values: Sequence[Tensor], dim: int, scale: Scale, *, relu: bool) -> Any:
    """A sum, product or concatenation of quantized tensors."""
    ops = torch.ops.quantized
    if name == "cat":
        return ops.cat(list(values), dim, *scale)
    return getattr(ops, name + ("_relu" if relu else ""))(*values, *scale)


def tensors_to_float(value: Any) -> Any:
    """Quantized tensors in lists, tuples and dicts, dequantized."""
    if isinstance(value, Tensor):
        return value.dequantize() if value.is_quantized else value
    if isinstance(value, dict):
        return {key: tensors_to_float(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [tensors_to_float(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
