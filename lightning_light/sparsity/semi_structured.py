"""Convert 2:4 sparse linear layers for GPUs with sparse tensor cores."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_light.errors import UnsupportedError
from lightning_light.sparsity.patterns import NM
from lightning_light.targets import Targets, as_targets
from lightning_light.validation import validated

__all__ = ["to_semi_structured"]


@validated
def to_semi_structured(model: nn.Module, *, targets: Targets | str | list[str] | None = None) -> list[str]:
    """Compress the weights of 2:4 sparse linear layers, in place, for inference on a GPU with sparse tensor cores.

    Everything is checked before anything is changed. The layers can no longer be trained.

    Args:
        model: on such a GPU, in half precision, bfloat16 or int8.
        targets: linear layers; other layers are not changed.

    Returns:
        The names of the converted layers.

    Raises:
        ValueError: a layer's weights are not 2:4 sparse, or of a data type that these cores do not support.
        UnsupportedError: the model is not on a CUDA device of compute capability 8.0 or more.
    """
    layers = {n: m for n, m in as_targets(targets).select(model).items() if isinstance(m, nn.Linear)}
    for name, layer in layers.items():
        _check_pattern(name, layer.weight.detach())
    for name, layer in layers.items():
        _check_hardware(name, layer.weight.detach())
    compressed = [torch.sparse.to_sparse_semi_structured(layer.weight.detach()) for layer in layers.values()]
    for layer, weight in zip(layers.values(), compressed, strict=True):
        layer.weight = nn.Parameter(weight, requires_grad=False)
    return list(layers)


def _check_pattern(name: str, weight: Tensor) -> None:
    if NM(2, 4).incompatibility(weight.shape) or bool((weight.reshape(-1, 4) != 0).sum(dim=1).gt(2).any()):
        raise ValueError(
            f"`to_semi_structured` on `{name}`: expected at most 2 nonzero weights of every 4 neighbouring "
            "inputs, found more. Train with `WeightPruning(pattern=NM(2, 4))`, or exclude the layer."
        )


def _check_hardware(name: str, weight: Tensor) -> None:
    if weight.device.type != "cuda" or torch.cuda.get_device_capability(weight.device) < (8, 0):
        raise UnsupportedError(
            f"`to_semi_structured` on `{name}`: expected weights on an NVIDIA GPU with sparse cores (compute "
            f"capability 8.0 or more), found {weight.device}. Elsewhere a 2:4 pattern "
            "reduces the compressed size only."
        )
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.int8):
        raise ValueError(
            f"`to_semi_structured` on `{name}`: expected float16, bfloat16 or int8, found {weight.dtype}. Convert "
            "first: `model.half()`."
        )
