"""Find the weights that can be masked, with their names and their layout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from lightning_light.errors import TargetError, UnsupportedError
from lightning_light.measure.sparsity import output_first
from lightning_light.targets import Targets, inside
from lightning_light.trained_weights import TrainedWeight, loose_parameters, other_parametrizations, trained_weights

__all__ = ["MaskableWeight", "find_weights"]

_TABLES = (nn.Embedding, nn.EmbeddingBag)
_MARKS = ("weight", "proj")


@dataclass(frozen=True, eq=False)
class MaskableWeight:
    """One weight of one layer.

    Attributes:
        name: as in ``named_parameters()``; a tied weight has the name under its first owner.
        parameter: the live parameter.
        layer: name of the layer that owns it.
        module: that layer.
        source: what is masked for which weight of the layer.
    """

    name: str
    parameter: nn.Parameter
    layer: str
    module: nn.Module
    source: TrainedWeight

    @property
    def output_dim(self) -> int:
        """The axis of the weight that counts outputs; transposed convolutions store it second."""
        return 1 if isinstance(self.module, nn.modules.conv._ConvTransposeNd) else 0

    def oriented(self, tensor: Tensor) -> Tensor:
        """View ``tensor``, in the layout of the weight, as ``(out, in, *kernel)``; its own inverse."""
        return output_first(self.module, tensor)


def find_weights(
    model: nn.Module, targets: Targets, method: str, left_alone: Sequence[str] = ()
) -> list[MaskableWeight]:
    """List every weight of two or more axes in ``targets`` once, without embedding tables.

    Weights are parameters called ``weight`` or, in layers that are not torch's, ``proj`` (of experts), and what weight
    norm and spectral norm compute a weight from. Modules in ``left_alone`` have none.

    Raises:
        TargetError: the targets match nothing, or nothing with such a weight.
        UnsupportedError: a layer has a mask of ``torch.nn.utils.prune`` already, or a weight that another
            parametrization computes.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[int, MaskableWeight] = {}
    selected = targets.select(model, root=True)
    selected = {name: module for name, module in selected.items() if not inside(name, left_alone)}
    for layer, module in selected.items():
        _refuse_computed(method, layer, module)
        for source in [] if isinstance(module, _TABLES) else trained_weights(module, _MARKS):
            parameter = source.parameter
            if not nn.parameter.is_lazy(parameter) and parameter.ndim >= 2:
                weight = MaskableWeight(names[id(parameter)], parameter, layer, module, source)
                found.setdefault(id(parameter), weight)
    if not found:
        others = loose_parameters(model, selected)
        raise TargetError(
            f"`{method}(targets={targets!r})`: expected at least one layer with a weight of two or more axes "
            f"(convolution, linear, attention, recurrent), found none among {len(selected)} modules{_named(others)}. "
            "Widen `targets`."
        )
    return list(found.values())


def _named(parameters: Iterable[str]) -> str:
    names = ", ".join(f"`{name}`" for name in parameters)
    return f", besides {names}, whose names have no `weight` or `proj`" if names else ""


def _refuse_computed(method: str, layer: str, module: nn.Module) -> None:
    if any(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values()):
        raise UnsupportedError(
            f"`{method}`: expected plain weights, found a mask of `torch.nn.utils.prune` on `{layer}`. Make it "
            "permanent first, `torch.nn.utils.prune.remove(layer, 'weight')`, or exclude the layer from `targets`."
        )
    others = other_parametrizations(module)
    if others:
        raise UnsupportedError(
            f"`{method}` on `{layer}`: expected a plain weight, or one under weight norm or spectral norm, found "
            f"`{others[0]}` computed by another parametrization, through which masked elements need not stay zero. "
            f"Exclude the layer: `targets=Targets(exclude={layer!r})`, or make the parametrization permanent with "
            f"`torch.nn.utils.parametrize.remove_parametrizations(layer, {others[0]!r})`."
        )
