"""`MixedPrecision`: a recipe per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn
from typing_extensions import override

from lightning_light.quantization.recipes import Engine, Int8, Recipe
from lightning_light.quantization.specs import LayerSpec
from lightning_light.targets import as_targets

__all__ = ["MixedPrecision"]


@dataclass(frozen=True, repr=False)
class MixedPrecision(Recipe):
    """Quantize layers by recipes of their own: by name, or the first and the last one.

    The first pattern of ``layers`` that names a layer decides; ``first`` and ``last`` go before all of them.

    Example:
        >>> from lightning_light.quantization import Int8, IntN
        >>> MixedPrecision({"layer1.*": Int8()}, default=IntN(weights=6))
        MixedPrecision(layers={'layer1.*': Int8()}, default=IntN(weights=6))

    Args:
        layers: pattern, as in `Targets` -> recipe.
        default: of the other layers.
        first: of the layer that is called first.
        last: of the layer that is called last.
        exclude: layers that stay float; the parts have none of their own.

    Raises:
        ValueError: a part has ``exclude``, is mixed itself, or is for another engine than the others.
        TypeError: a part is no recipe.
    """

    layers: Mapping[str, Recipe] = field(default_factory=dict)
    default: Recipe = Int8()
    first: Recipe | None = None
    last: Recipe | None = None
    engine: Engine = field(default="qnnpack", init=False)

    def __post_init__(self) -> None:
        parts = [*self.layers.values(), self.default, *filter(None, (self.first, self.last))]
        for part in parts:
            if not isinstance(part, Recipe):
                raise TypeError(
                    f"`MixedPrecision(...)`: expected recipes, found {part!r}. Write `Int8()`, for instance."
                )
            if isinstance(part, MixedPrecision) or part.exclude is not None:
                raise ValueError(
                    f"`MixedPrecision(...)` with {part!r}: expected recipes that are neither mixed nor exclude layers "
                    "themselves. Write `MixedPrecision(..., exclude=...)`."
                )
        engines = sorted({part.engine for part in parts})
        if len(engines) > 1:
            raise ValueError(
                f"`MixedPrecision(...)`: expected recipes for one engine, found {engines}. Give all parts "
                "the same `engine=`."
            )
        object.__setattr__(self, "engine", engines[0])

    @override
    def spec(self) -> LayerSpec:
        return self.default.spec()

    @override
    def specs(self, model: nn.Module, layers: Sequence[str]) -> dict[str, LayerSpec]:
        found = super().specs(model, layers)
        for pattern, recipe in reversed(list(self.layers.items())):
            named = as_targets(pattern).select(model)
            found |= {layer: recipe.spec() for layer in layers if layer in named and layer in found}
        ends = [(layers[-1], self.last), (layers[0], self.first)] if layers else []
        return found | {layer: end.spec() for layer, end in ends if end is not None and layer in found}
