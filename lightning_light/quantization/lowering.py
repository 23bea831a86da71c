"""The plan again, this time with numbers that are int8: what was rounded runs on the engine's kernels."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from lightning_light.quantization import kernels
from lightning_light.quantization.operations import ADDING, BATCH_NORM, kind_of
from lightning_light.quantization.places import module_of
from lightning_light.quantization.plan import Group

if TYPE_CHECKING:
    from lightning_light.quantization.attachment import Attachment

__all__ = ["Lowering"]

_KEEPS_GRID = {"move", "pool"}
_ASKS = {"__get__", "size", "dim", "numel", "ndimension", "is_floating_point", "__len__", "is_contiguous"}
_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_SUMS = {"add": "add", "mul": "mul", "cat": "cat"}


class Lowering:
    """Computes one forward pass on int8 kernels, in three rounds: collect, try, run.

    The first notes the weights and statistics of every group. The second finds out what the engine cannot do; that
    stays float, between tensors on their grids. The third does the same again, and can be traced.

    Attributes:
        layers: operation -> its kernel.
        refused: operation -> why it stays float.
    """

    def __init__(self, attachment: Attachment) -> None:
        self.attachment, self.plan, self.engine = attachment, attachment.plan, attachment.engine
        self.scales = attachment.scales
        self.layers: dict[str, kernels.Layer] = {}
        self.refused: dict[str, str] = dict(self.plan.without_kernel)
        self.trying = True
        self._collected: dict[str, dict[str, Any]] = {}
        self._grids: dict[str, tuple[float, int]] = {}  # of what was moved in float
        self._heads = {
            part: head for head, group in self.plan.groups.items() for part in (group.batch_norm, group.relu) if part
        }

    # The first round.

    def collect(self, key: str, name: str, args: list[Any], kwargs: Mapping[str, Any]) -> None:
        """Note the arguments of a layer or batch norm, by name."""
        if key in self.plan.weights or (key in self._heads and kind_of(name) == BATCH_NORM):
            self._collected[key] = {**dict(zip(_parameters(name), args, strict=False)), **kwargs}

    def build(self) -> None:
        """Fold and pack every layer."""
        for key in [key for key in self.plan.weights if key not in self.refused]:
            group, scale = self.plan.groups[key], self._scale_of(self.plan.groups[key])
            if key not in self._collected or scale is None:
                self.refused[key] = "the network did not come by it" if scale else "its output was never observed"
                continue
            norm = None if group.batch_norm is None else self._collected[group.batch_norm]
            name = key.split("|")[2]
            if kind_of(name) == "transposed" and self.engine == "x86":  # dozens of steps off, whatever the ranges
                self.refused[key] = "the x86 kernel of transposed convolutions computes wrong numbers"
                continue
            rule, step = self.attachment.weight(key)
            try:
                self.layers[key] = kernels.Layer.of(
                    name, self._collected[key], norm, relu=group.relu is not None, scale=scale, rule=rule, step=step
                )
            except (RuntimeError, NotImplementedError, AttributeError) as error:
                self.refused[key] = f"the engine has no kernel: {str(error).strip().splitlines()[0]}"
        self._collected = {}

    # The second and the third.

    def run(self, key: str, name: str, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """One operation."""
        if name in _ASKS:
            return function(*args, **kwargs)
        self._take_in(key, args, kwargs)
        head = self._heads.get(key)
        if head is not None and head not in self.refused:
            return args[0]  # the kernel of the group has done it
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
        if kind in _KEEPS_GRID and isinstance(first, Tensor) and first.is_quantized:
            return True, function(*args, **kwargs)
        return False, None

    def _join(self, key: str, kind: str, group: Group, args: list[Any], kwargs: dict[str, Any]) -> tuple[bool, Any]:
        scale = self._scale_of(group)
        values = list(args[0]) if kind == "cat" else [*args, *kwargs.values()][:2]
        if scale is None or not all(isinstance(value, Tensor) and value.is_quantized for value in values):
            raise NotImplementedError("not all of it is on a grid")
        if self.trying and kind == "add" and not kernels.add_fits(values, scale):
            raise NotImplementedError("the scales are too far apart")
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) if kind == "cat" else 0
        return True, kernels.join(_SUMS[kind], values, dim, scale, relu=group.relu is not None)

    def _in_float(self, key: str, name: str, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        kind = kind_of(name)
        moved = args[0] if kind in _KEEPS_GRID and args and isinstance(args[0], Tensor) else None
        if moved is not None and moved.is_quantized and self.trying:
            self._grids[key] = (moved.q_scale(), moved.q_zero_point())
        args, kwargs = kernels.tensors_to_float(args), kernels.tensors_to_float(kwargs)
        self.attachment.before(key, kind, args, kwargs)
        result = function(*args, **kwargs)
        grid = self.plan.outputs.get(key)
        scale = self._grids.get(key) if grid is None else self.scales[grid]
        if scale is None or not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        return kernels.quantize(result, scale)

    def _scale_of(self, group: Group) -> tuple[float, int] | None:
        return self.scales[self.plan.outputs[group.tail]]

    def left_float(self) -> dict[str, str]:
        """Layers with a weight that stay float, and why."""
        refused = {module_of(key): reason for key, reason in self.refused.items() if key in self.plan.weights}
        return {**self.plan.left_float, **refused}


def _parameters(name: str) -> tuple[str, ...]:
    if name.startswith("conv"):
        return _TRANSPOSED if "transpose" in name else _CONVOLUTION
    return (
        tuple(inspect.signature(getattr(F, name)).parameters) if name == "batch_norm" else ("input", "weight", "bias")
    )
