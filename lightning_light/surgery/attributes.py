"""Attributes of ``torch.nn`` layers that state the sizes of their tensors."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["implied_attributes"]

_SIZES: dict[Any, tuple[str, ...]] = {
    nn.modules.batchnorm._NormBase: ("num_features",),
    nn.GroupNorm: ("num_channels",),
    nn.PReLU: ("num_parameters",),
    (nn.Embedding, nn.EmbeddingBag): ("num_embeddings", "embedding_dim"),
    nn.Bilinear: ("out_features", "in1_features", "in2_features"),
}
"""Classes -> attributes that state the sizes of the dimensions of their weight."""


def implied_attributes(module: nn.Module) -> dict[str, Any]:
    """Attribute -> value, as implied by the shapes of ``module``'s own tensors; empty for modules that are not torch's.

    The number of groups of a grouped convolution is not implied; a depthwise one keeps its outputs per input.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in _tensors(module)}
    shape = shapes.get("weight", shapes.get("weight_v"))
    if isinstance(module, nn.modules.conv._ConvNd):
        return _convolution(module, shape or tuple(module.weight.shape))
    if isinstance(module, nn.Linear):
        return dict(zip(("out_features", "in_features"), shape or module.weight.shape, strict=False))
    if isinstance(module, nn.MultiheadAttention):
        return _attention(module)
    if isinstance(module, nn.RNNBase):
        return _recurrent(module)
    return _by_weight(module, shape or shapes.get("running_mean"))


def _tensors(module: nn.Module) -> list[tuple[str, Any]]:
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return [(name, tensor) for name, tensor in own if tensor is not None]


def _convolution(module: nn.modules.conv._ConvNd, shape: tuple[int, ...]) -> dict[str, Any]:
    rows, columns, groups = shape[0], shape[1], module.groups
    if groups > 1 and module.in_channels == groups:  # depthwise
        multiplier = module.out_channels // groups
        groups = rows if module.transposed else rows // multiplier
        return {"in_channels": groups, "out_channels": groups * multiplier, "groups": groups}
    if module.transposed:
        return {"in_channels": rows, "out_channels": columns * groups}
    return {"in_channels": columns * groups, "out_channels": rows}


def _attention(module: nn.MultiheadAttention) -> dict[str, Any]:
    width = module.out_proj.weight.shape[0]
    keys = width if module.k_proj_weight is None else module.k_proj_weight.shape[1]
    values = width if module.v_proj_weight is None else module.v_proj_weight.shape[1]
    heads = width // module.head_dim if width % module.num_heads else module.num_heads
    return {"embed_dim": width, "kdim": keys, "vdim": values, "num_heads": heads, "head_dim": width // heads}


def _recurrent(module: nn.RNNBase) -> dict[str, Any]:
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    rows, columns = module.get_parameter("weight_ih_l0").shape
    sizes = {"input_size": columns, "hidden_size": rows // gates}
    return sizes | ({"proj_size": module.get_parameter("weight_hh_l0").shape[1]} if module.proj_size else {})


def _by_weight(module: nn.Module, shape: tuple[int, ...] | None) -> dict[str, Any]:
    if shape is None:
        return {}
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return {"normalized_shape": shape}
    names = next((names for kinds, names in _SIZES.items() if isinstance(module, kinds)), ())
    return dict(zip(names, shape, strict=False))
