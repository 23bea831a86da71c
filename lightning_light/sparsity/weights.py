"""Find the weights that can be masked, with their names and their layout."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from lightning_light.errors import TargetError, UnsupportedError
from lightning_light.targets import Targets

__all__ = ["MaskableWeight", "find_weights"]

_TABLES = (nn.Embedding, nn.EmbeddingBag)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, eq=False)
class MaskableWeight:
    """One weight of one layer.

    Attributes:
        name: as in ``named_parameters()``; a tied weight has the name under its first owner.
        parameter: the live parameter.
        layer: name of the layer that owns it.
        module: that layer.
    """

    name: str
    parameter: nn.Parameter
    layer: str
    module: nn.Module

    @property
    def output_dim(self) -> int:
        """The axis of the weight that counts outputs; transposed convolutions store it second."""
        return 1 if isinstance(self.module, _TRANSPOSED) else 0

    def oriented(self, tensor: Tensor) -> Tensor:
        """View ``tensor``, in the layout of the weight, as ``(out, in, *kernel)``; its own inverse."""
        return tensor.transpose(0, 1) if self.output_dim else tensor


def find_weights(model: nn.Module, targets: Targets, method: str) -> list[MaskableWeight]:
    """List every weight of two or more axes in ``targets`` once, without embedding tables and parametrized weights.

    Raises:
        TargetError: the targets match nothing, or nothing with such a weight.
        UnsupportedError: a layer has a mask of ``torch.nn.utils.prune`` already.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[int, MaskableWeight] = {}
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
                found.setdefault(id(parameter), MaskableWeight(names[id(parameter)], parameter, layer, module))
    if not found:
        raise TargetError(
            f"`{method}(targets={targets!r})`: expected at least one layer with a weight of two or more axes "
            f"(convolution, linear, attention, recurrent), found none among {len(selected)} modules. Widen `targets`."
        )
    return list(found.values())
