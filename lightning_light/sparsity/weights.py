"""Which weights can be masked, under which names, and in which layout they are looked at."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from lightning_light.errors import TargetError, UnsupportedError
from lightning_light.measure.sparsity import facing
from lightning_light.targets import Targets

__all__ = ["Weight", "find_weights"]

_TABLES = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True, eq=False)
class Weight:
    """One weight of one layer.

    Attributes:
        name: as in ``named_parameters()``; a tied weight goes by its first owner's name.
        parameter: the live parameter.
        layer: name of the layer that owns it.
        module: that layer.
    """

    name: str
    parameter: nn.Parameter
    layer: str
    module: nn.Module

    def facing(self, tensor: Tensor) -> Tensor:
        """``tensor``, stored as the weight is, as ``(out, in, *kernel)``; its own inverse."""
        return facing(self.module, tensor)


def find_weights(model: nn.Module, targets: Targets, method: str) -> list[Weight]:
    """Every weight of two or more axes below ``targets``, once; embedding tables and parametrized weights are left out.

    Raises:
        TargetError: the targets name nothing, or nothing with such a weight.
        UnsupportedError: a layer has a mask of ``torch.nn.utils.prune`` already.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[int, Weight] = {}
    selected = targets.select(model)
    for layer, module in selected.items():
        if any(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values()):
            raise UnsupportedError(
                f"`{method}`: expected plain weights, found a mask of `torch.nn.utils.prune` on `{layer}`. Make it "
                "permanent first, `torch.nn.utils.prune.remove(layer, 'weight')`, or exclude the layer from `targets`."
            )
        for own, parameter in module.named_parameters(recurse=False):
            is_weight = "weight" in own and parameter.ndim >= 2 and not nn.parameter.is_lazy(parameter)
            if is_weight and not isinstance(module, _TABLES):
                found.setdefault(id(parameter), Weight(names[id(parameter)], parameter, layer, module))
    if not found:
        raise TargetError(
            f"`{method}(targets={targets!r})`: expected at least one layer with a weight of two or more axes "
            f"(convolution, linear, attention, recurrent), found none among {len(selected)} modules. Widen `targets`."
        )
    return list(found.values())
