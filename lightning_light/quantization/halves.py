"""Scales at which every runtime finds the same whole number, since no result is near to a half.

- Sums and concatenations. QNNPACK and XNNPACK multiply by fixed-point numbers of 21 and 20 bits and send halves up or
  away from zero, ONNX Runtime and x86 compute in float and send them to the even number. Scales are widened a little,
  until their ratio is ``k_x / k_y`` with whole numbers and an odd ``k_y``: twice a multiple of ``1 / k_y`` is never an
  odd number, so the nearest half is ``1 / (2 k_y)`` away.
- Products: likewise, with the ratio ``s_a s_b / s_y``.
- Means. That of two numbers is a half often enough, and goes to the even number: of steps from zero, or from the
  lowest number, as an engine likes. With an even zero point that is the same. QNNPACK multiplies the sum of ``n``
  numbers by ``s / (n s)``, which is ``1 / n`` where ``n s`` is a number of float32: scales have few bits.
- What was computed in float is put on its grid by ``x / s`` or by ``x * (1 / s)``. They are the same where ``1 / s``
  is nearly a number of float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import torch

from lightning_light.quantization.lowering.weights import Scale
from lightning_light.quantization.plan import Plan
from lightning_light.quantization.rounding import single
from lightning_light.quantization.rules import Grid

__all__ = ["Halves"]

_HIGHEST: Final = 255
_MOST: Final = 1001  # half of 1/1001 is four times what 255 steps of 2**-21 come to
_LEAST: Final = 101  # a scale grows by at most two of so many parts
_PRODUCTS: Final = 2001
_BITS: Final = 18  # of a scale: 64 times as much, for instance, is a number of float32
_UNIT_BITS: Final = 8  # times one of ten bits
_NEAR: Final = 128  # of the next numbers of so many bits: 0.1 % at most


class Halves:
    """Knows which grids meet in sums and products, and moves their scales.

    Args:
        plan: of the network.
    """

    def __init__(self, plan: Plan) -> None:
        self._families = _families(plan.sums)
        self._family_of = {grid: family for family in self._families for grid in family}
        self._averaged = {plan.outputs[key] for key in plan.means}
        self._products = [product for product in plan.products if len({*product}) == len(product)]

    def avoided(self, scales: Sequence[Scale | None], grids: Sequence[Grid]) -> list[Scale | None]:
        """The scales, where it can be, with ratios that keep away from halves, and even zero points for means.

        Args:
            scales: of every grid.
            grids: what is known of them; what is learned is not moved, and hardly a grid that cuts off at six.
        """
        found, settled = list(scales), {place for place, grid in enumerate(grids) if grid.learned or grid.cap}
        for place in (place for place, grid in enumerate(grids) if grid.cap and not grid.learned):
            found[place] = _with(found[place], _short(_step(found, place), _BITS, math.floor))
        for place in self._averaged - settled:
            found[place] = _with_even_zero(found[place], grids[place].high)
        for family in self._families:
            unit = _short(max(_step(found, grid) for grid in family) / _MOST, _UNIT_BITS)
            if not unit or not settled.isdisjoint(family):
                continue
            for grid in family:
                count = _odd(_step(found, grid) / unit)
                if count >= _LEAST:
                    found[grid] = _with(found[grid], count * unit)
        alone = [place for place, scale in enumerate(found) if scale and place not in settled.union(self._family_of)]
        for place, step in zip(alone, _invertible([_step(found, place) for place in alone]), strict=True):
            found[place] = _with(found[place], step)
        for product in self._products:
            self._multiply(found, product, settled)
        return found

    def _multiply(self, found: list[Scale | None], product: Sequence[int], settled: set[int]) -> None:
        """Widen one grid of a product, and all that is added to it likewise, so that their ratios stay."""
        *factors, result = product
        step = math.prod(_step(found, grid) for grid in factors)
        families = {grid: self._family_of.get(grid, {grid}) for grid in (result, *factors)}
        free = [
            grid
            for grid in families
            if settled.isdisjoint(families[grid])
            and not any(other in families[grid] for other in product if other != grid)
        ]
        if not (free and step and _step(found, result)):
            return
        ratio = _step(found, result) / step
        ratio *= 2.0 ** max(0, round(math.log2(_PRODUCTS / ratio)))
        grid = min(free, key=lambda grid: (len(families[grid]), not self._averaged.isdisjoint(families[grid])))
        widened = _odd(ratio) / ratio if grid == result else ratio / _odd(ratio * (1.0 + 2e-6) - 2)
        for each in families[grid]:
            found[each] = _with(found[each], _step(found, each) * widened)
        settled.update(*families.values())


def _families(sums: Iterable[Sequence[int]]) -> list[set[int]]:
    """The grids that are tied to each other by sums."""
    families: list[set[int]] = []
    for grids in sums:
        tied = [family for family in families if not family.isdisjoint(grids)]
        families = [family for family in families if family not in tied] + [set(grids).union(*tied)]
    return families


def _step(scales: Sequence[Scale | None], grid: int) -> float:
    scale = scales[grid]
    return 0.0 if scale is None else scale[0]


def _with(scale: Scale | None, step: float) -> Scale | None:
    return scale and (single(step), scale[1])


def _short(step: float, bits: int, to: Callable[[float], int] = math.ceil) -> float:
    """With so many significant bits, and not less; or not more, with `math.floor`."""
    fraction, exponent = math.frexp(step)
    return math.ldexp(to(fraction * 2**bits), exponent - bits)


def _invertible(steps: list[float]) -> list[float]:
    """Each a little larger and short, where what ``1 / s`` loses in float32 is least."""
    short = torch.tensor([_short(step, _BITS) for step in steps], dtype=torch.float32).view(torch.int32)
    near = (short[:, None] + (torch.arange(_NEAR, dtype=torch.int32) << 24 - _BITS)).view(torch.float32)
    lost = (near.double() * (1.0 / near).double() - 1.0).abs()
    best: list[float] = near.gather(1, lost.argmin(1, keepdim=True)).flatten().tolist()
    return best


def _with_even_zero(scale: Scale | None, high: int) -> Scale | None:
    """Wider by the step that the zero point moves, towards the shorter side; fewer bits have no kernel of a pool."""
    if scale is None or scale[1] % 2 == 0 or high != _HIGHEST:
        return scale
    step, zero = scale
    if 2 * zero > high:
        return _with((step, zero - 1), step * zero / (zero - 1))
    return _with((step, zero + 1), step * (high - zero) / (high - zero - 1))


def _odd(x: float) -> int:
    """The smallest odd number that is not less, but for float32."""
    whole = math.ceil(x * (1.0 - 1e-6))
    return whole if whole % 2 else whole + 1
