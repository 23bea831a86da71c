"""The plan with numbers that are int8: what was rounded runs on kernels of torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_light.int8 import Int8Form
from lightning_light.quantization.lowering import kernels
from lightning_light.quantization.lowering.lowered import ASKS, Lowered, Rounds, scalar
from lightning_light.quantization.lowering.weights import Scale, Weight, in_one_place
from lightning_light.quantization.operations import ADDING, kind_of, moves
from lightning_light.quantization.plan import Group

__all__ = ["Lowering"]


class Lowering(Lowered):
    """Computes one forward pass on int8 kernels.

    Attributes:
        layers: operation -> its kernel.
    """

    def __init__(self, attachment: Rounds, engine: str) -> None:
        super().__init__(attachment)
        self.engine = engine
        self.layers: dict[str, kernels.Layer] = {}
        self._grids: dict[str, Scale] = {}  # of what was moved in float

    @cached_property
    def _placed(self) -> dict[str, Weight]:
        return in_one_place(self.weights)

    @cached_property
    def _zeros(self) -> Tensor:
        """The zero points of every layer's channels: the layer with the most needs all of them."""
        return torch.zeros(max(len(weight.integers) for weight in self.weights.values()), dtype=torch.int64)

    @override
    def _prepare(self, key: str, name: str, args: Mapping[str, Any]) -> None:
        group = self.plan.groups[key]
        scale = self._scale_of(group)
        assert scale is not None  # `build` has refused the others
        if kind_of(name) == "transposed" and self.engine == "x86":  # dozens of steps off, whatever the ranges
            self.refused[key] = "the x86 kernel of transposed convolutions computes wrong numbers"
            return
        try:
            self.layers[key] = kernels.Layer.of(
                name, self._placed[key], args, relu=group.relu is not None, scale=scale, zeros=self._zeros
            )
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            self.refused[key] = f"the engine has no kernel: {str(error).strip().splitlines()[0]}"

    @override
    def run(self, key: str, name: str, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if name in ASKS:
            return function(*args, **kwargs)
        self._take_in(key, args, kwargs)
        if self._is_done_by_its_layer(key):
            return args[0]
        if key not in self.refused:
            try:
                done, result = self._on_kernel(key, name, function, args, kwargs)
            except (RuntimeError, NotImplementedError) as error:
                if not self.trying:
                    raise
                self.refused[key] = f"the kernel stopped: {str(error).strip().splitlines()[0]}"
            else:
                if done:
                    return result
        return self._in_float(key, name, function, args, kwargs)

    @override
    def described(self) -> Int8Form:
        found = super().described()
        found.packed = [layer.packed for key, layer in self.layers.items() if key not in self.refused]
        return found

    @override
    def _scale_at(self, leaf: Tensor) -> Tensor:
        return scalar(leaf.q_scale() if leaf.is_quantized else 0.0)

    @override
    def _in_the_end(self, output: Any) -> Any:
        return kernels.tensors_to_float(output)

    def _take_in(self, key: str, args: list[Any], kwargs: dict[str, Any]) -> None:
        if key in self.plan.without_kernel:
            return
        for place, grid in self.plan.arguments.get(key, {}).items():
            scale, name = self.scales[grid], None if place < len(args) else list(kwargs)[place - len(args)]
            if scale is not None and name is None:
                args[place] = kernels.quantize(args[place], scale)
            elif scale is not None and name is not None:
                kwargs[name] = kernels.quantize(kwargs[name], scale)

    def _on_kernel(
        self, key: str, name: str, function: Any, args: list[Any], kwargs: dict[str, Any]
    ) -> tuple[bool, Any]:
        kind, group = kind_of(name), self.plan.groups.get(key)
        first: Any = args[0] if args else kwargs.get("input")
        if key in self.layers:
            if not first.is_quantized:
                raise NotImplementedError("its input is not on a grid")
            return True, self.layers[key](first)
        if group is not None and (kind in ADDING or kind == "cat"):
            return self._join(key, kind, group, args, kwargs)
        if isinstance(first, Tensor) and first.is_quantized and self._keeps_grid(key, name, first, args, kwargs):
            return True, kernels.kept(self.engine, name, function, args, kwargs)
        return False, None

    def _keeps_grid(self, key: str, name: str, first: Tensor, args: list[Any], kwargs: dict[str, Any]) -> bool:
        """Whether the plan wants a result on the grid of what is read, where the kernels leave it."""
        return key in self.plan.means or moves(name, args, kwargs)

    def _join(self, key: str, kind: str, group: Group, args: list[Any], kwargs: dict[str, Any]) -> tuple[bool, Any]:
        scale = self._scale_of(group)
        values = list(args[0]) if kind == "cat" else [*args, *kwargs.values()][:2]
        if scale is None or not all(isinstance(value, Tensor) and value.is_quantized for value in values):
            raise NotImplementedError("not all of it is on a grid")
        if self.trying and kind == "add" and not kernels.add_fits(values, scale):
            raise NotImplementedError("the scales are too far apart")
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) if kind == "cat" else 0
        return True, kernels.join(kind, values, dim, scale, relu=group.relu is not None)

    def _in_float(self, key: str, name: str, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        moved = args[0] if moves(name, args, kwargs) and args and isinstance(args[0], Tensor) else None
        if moved is not None and moved.is_quantized and self.trying:
            self._grids[key] = (moved.q_scale(), moved.q_zero_point())
        args, kwargs = kernels.tensors_to_float(args), kernels.tensors_to_float(kwargs)
        self.attachment.before(key, kind_of(name), args, kwargs)
        result = function(*args, **kwargs)
        grid = self.plan.outputs.get(key)
        scale = self._grids.get(key) if grid is None else self.scales[grid]
        if scale is None or not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        return kernels.quantize(result, scale)
