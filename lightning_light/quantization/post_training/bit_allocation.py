"""Allocate bits to layers within a size or cost budget, with the smallest change of the outputs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_light.budgets import Size
from lightning_light.errors import BudgetError
from lightning_light.integer_program import choose_items
from lightning_light.quantization.post_training.sensitivity import Sensitivity
from lightning_light.quantization.recipes import Bits, IntN, MixedPrecision
from lightning_light.validation import OpenFraction, validated

__all__ = ["BitBudget"]


@validated
@dataclass(frozen=True)
class BitBudget:
    """Allocate bits to each layer, within a budget for the whole network.

    Of all ways to give each layer one of the widths that keep the budget, it takes the one with the smallest sum of
    measured distances, by dynamic programming over the Pareto front of cost and distance. Layers are assumed to change
    the outputs independently of each other, as HAWQ and ZeroQ do.

    Dong et al., 2020, "HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks".
    https://arxiv.org/abs/1911.03852
    Cai et al., 2020, "ZeroQ: A Novel Zero Shot Quantization Framework". https://arxiv.org/abs/2001.00281

    Example:
        >>> from lightning_light.quantization import Sensitivity
        >>> scan = Sensitivity({"stem": {4: 0.5, 8: 0.01}, "head": {4: 0.2, 8: 0.02}}, {"stem": 90, "head": 90}, {})
        >>> BitBudget(size=140).solve(scan)
        {'stem': 8, 'head': 4}

    Args:
        size: bytes of the weights of all layers with one, packed: ``"40 kB"``, or an int. Biases and normalizations
            are not counted: they are not quantized.
        bops: instead of it, the remaining fraction of the bit operations (MACs times bits of the weight times bits of
            the activation), of those with the widest width in all layers; in (0, 1].
        widths: that a layer may have; all that were measured by default.

    Raises:
        ValueError: neither or both of ``size`` and ``bops``, or one out of range; widths that no recipe has.
    """

    size: int | str | None = None
    bops: OpenFraction | None = None
    widths: Sequence[Bits] | None = None

    def __post_init__(self) -> None:
        if (self.size is None) == (self.bops is None):
            raise ValueError(
                f"`{self!r}`: expected one of `size` and `bops`, found {'none' if self.size is None else 'both'}. "
                "Write for instance `BitBudget(size='40 kB')`."
            )
        if self.size is not None:
            Size(self.size)

    def solve(self, scan: Sensitivity) -> dict[str, int]:
        """Return layer -> bits.

        Args:
            scan: of the network, with all ``widths``.

        Raises:
            ValueError: a width was not measured.
            BudgetError: even the smallest width in all layers is too much.
        """
        widths = sorted(scan.widths if self.widths is None else self.widths)
        if unknown := set(widths) - set(scan.widths):
            raise ValueError(
                f"`{self!r}`: expected widths that were measured, {scan.widths}, found {sorted(unknown)} besides. "
                f"Measure them: `measure_sensitivity(..., bits={tuple(widths)})`."
            )
        units = scan.weights if self.bops is None else scan.macs
        costs = {layer: [units[layer] * width for width in widths] for layer in scan.distances}
        losses = {layer: [found[width] for width in widths] for layer, found in scan.distances.items()}
        least, most = (sum(row[end] for row in costs.values()) for end in (0, -1))
        if self.size is not None:
            limit, remains = 8.0 * Size(self.size).bytes, f"the weights still take {-(-least // 8)} bytes"
        else:
            fraction = least / max(most, 1)
            limit, remains = (self.bops or 0.0) * most, f"{fraction:.3f} of the bit operations remain"
        if least > limit:
            raise BudgetError(f"`{self!r}`: with {widths[0]} bits in every layer {remains}.")
        items = [(layer, place) for layer in costs for place in range(1, len(widths))]  # in place of the smallest width
        found = choose_items(
            [losses[layer][place] - losses[layer][0] for layer, place in items],
            [[costs[layer][place] - costs[layer][0] for layer, place in items]],
            [limit - least],
            exclusive=[{number for number, item in enumerate(items) if item[0] == layer} for layer in costs],
        )
        assert found is not None  # the smallest widths are within the limit
        return dict.fromkeys(costs, widths[0]) | {
            layer: widths[place] for layer, place in map(items.__getitem__, found)
        }

    def recipe(self, scan: Sensitivity, base: IntN = IntN()) -> MixedPrecision:
        """Return ``base`` with the bits that `solve` allocates to the weight of each layer.

        Args:
            scan: of the network.
            base: determines the rest: bits of activations, observer, engine.

        Raises:
            ValueError: as `solve`.
            BudgetError: as `solve`.
        """
        plain = replace(base, exclude=None)
        solved = self.solve(scan)
        inner_first = sorted(solved, key=lambda layer: -layer.count("."))  # a pattern names what is inside, too
        layers = {f"re:{re.escape(layer)}": replace(plain, weights=solved[layer]) for layer in inner_first}
        return MixedPrecision(layers, default=plain, exclude=base.exclude)
