"""Average pools as the runtimes compute them: the mean of whole numbers, and half a step goes to the even one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor

from lightning_light.quantization.operations import set_argument

__all__ = ["averaged", "exact_mean", "mean_of_whole_numbers"]

_HALVES: Final = 1.5 * 2.0**23  # float32 has no fractions here: to add it rounds to the nearest, and half to even
_MANY: Final = 2**14  # as many steps of 255 are still far below that


def mean_of_whole_numbers(function: Any, args: list[Any], kwargs: dict[str, Any], step: float) -> Tensor:
    """An average pool on the grid of what it reads.

    Args:
        function: the operation.
        args: its arguments; what it reads, in float32, is on the grid.
        kwargs: likewise.
        step: of that grid.
    """
    x: Tensor = args[0] if args else kwargs["input"]
    set_argument(args, kwargs, 0, "input", (x * (1.0 / step)).round_())
    mean: Tensor = function(*args, **kwargs)
    return mean.round_().mul_(step)


def exact_mean(mean: Tensor, count: int, step: float) -> Tensor:
    """A mean that was taken in float, put on the grid as if it had been taken of whole numbers.

    In float the mean of 2 and 3 steps is a little more or less than 2.5. Their sum is 5 again, though, rounded to
    whole numbers. Written with sums and products alone, which every runtime has.

    Args:
        mean: of numbers on a grid.
        count: how many there were; where it is odd or large no half, or hardly any, is among the means.
        step: of that grid.
    """
    if count % 2 or count > _MANY:
        return mean
    total = (mean * (count / step) + _HALVES) - _HALVES
    return ((total * (1.0 / count) + _HALVES) - _HALVES) * step


def averaged(name: str, args: list[Any], kwargs: Mapping[str, Any], mean: Tensor) -> int:
    """Of how many numbers each mean is; 1 if not all are of as many, or sizes are not known."""
    x: Tensor = args[0] if args else kwargs["input"]
    if name == "avg_pool2d":
        given = {**dict(zip(_AVG_POOL, args, strict=False)), **kwargs}
        kernel, padding = _pair(given["kernel_size"]), _pair(given.get("padding", 0))
        differ = any(padding) and not given.get("count_include_pad", True)
        return 1 if differ or given.get("ceil_mode") or given.get("divisor_override") else math.prod(kernel)
    if name == "mean":
        sizes = [x.shape[dim] for dim in _dims(args, kwargs, x.dim())]
    else:
        pairs = [(x.shape[dim], mean.shape[dim]) for dim in range(-1 if name.endswith("1d") else -2, 0)]
        if not all(isinstance(size, int) for pair in pairs for size in pair) or any(a % b for a, b in pairs):
            return 1
        sizes = [size // bins for size, bins in pairs]
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else 1


_AVG_POOL: Final = (
    "input",
    "kernel_size",
    "stride",
    "padding",
    "ceil_mode",
    "count_include_pad",
    "divisor_override",
)


def _pair(value: Any) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    return values * (2 // len(values))


def _dims(args: list[Any], kwargs: Mapping[str, Any], dims: int) -> list[int]:
    given = args[1] if len(args) > 1 else kwargs.get("dim")
    return list(range(dims)) if given is None else [given] if isinstance(given, int) else list(given)
