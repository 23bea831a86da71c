"""Build the factor layers that replace a layer, and register the edit log's operation that replays them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from lightning_light.lowrank.factors import Factors, compose, factor_form
from lightning_light.lowrank.splitting import split_module
from lightning_light.surgery.operations import register_operation
from lightning_light.surgery.plain_layers import POINTWISE, convolution_like
from lightning_light.surgery.replace import put_module, replaced_layer

__all__ = [
    "OPERATION",
    "build_factors",
    "disable_fast_paths",
    "exact_factors",
    "current_ranks",
    "dense_weight",
    "replay_factors",
]

OPERATION = "lowrank/factors"


def build_factors(old: nn.Module, form: str, ranks: Sequence[int], weights: Sequence[Tensor] = ()) -> Factors:
    """Build the factors of ``old`` without drawing random numbers.

    Args:
        old: a layer, or the factors of a layer, whose ranks are to be lowered.
        form: see `lightning_light.lowrank.spectra.Spectrum`.
        ranks: within a group.
        weights: of the factors, in order; without them the weights stay on ``meta``, for a replay.
    """
    layers = _layers(old, form, ranks)
    last = old[-1] if isinstance(old, nn.Sequential) else old
    layers[-1].bias = getattr(last, "bias", None)  # the same object: its optimizer state and its average stay
    reference = last.weight
    assert isinstance(reference, Tensor)
    for layer, weight in zip(layers, weights or [layer.weight.detach() for layer in layers], strict=True):
        value = weight.to(device=reference.device if weights else "meta", dtype=reference.dtype).contiguous()
        layer.weight = nn.Parameter(value, requires_grad=reference.requires_grad)
    factors = Factors(*layers)
    factors.factorized_form = form
    return factors


def exact_factors(layer: nn.Module, form: str) -> Factors:
    """Build a module with the attributes of factors of ``layer`` that computes with the layer itself.

    For a trial of the replacement: it takes no memory for weights.
    """
    factors = build_factors(layer, form, (1, 1) if form == "tucker2" else (1,))
    weight: Any = layer.weight
    for factor in factors:
        blank = weight.detach().new_zeros(1).expand(factor.weight.shape)
        factor.weight = nn.Parameter(blank, weight.requires_grad)
    vars(factors).update(forward=layer, _product=lambda: weight)
    return factors


@register_operation(OPERATION)
def replay_factors(model: nn.Module, entry: Mapping[str, Any]) -> None:
    """Split layers and build factors as the edit log records them; their tensors come from the state dict."""
    for name, parts in entry["split"]:
        put_module(model, name, split_module(model.get_submodule(name), parts))
    for name, form, ranks in entry["layers"]:
        put_module(model, name, build_factors(replaced_layer(model, name), form, ranks))
    disable_fast_paths(model, [name for name, _, _ in entry["layers"]])


def disable_fast_paths(model: nn.Module, names: Iterable[str]) -> None:
    """Turn off the fast paths of transformer layers, which read weights of layers that have been replaced."""
    parents = {".".join(path[:depth]) for path in (name.split(".") for name in names) for depth in range(len(path))}
    for name in parents:
        parent = model.get_submodule(name)
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0
        elif isinstance(parent, nn.TransformerEncoder):
            parent.use_nested_tensor = False


def _layers(old: Any, form: str, ranks: Sequence[int]) -> list[Any]:
    """Make layers without bias, their weights on ``meta``; ``old`` is a layer, or factors with its attributes."""
    rank = ranks[0]
    if form == "linear":
        return [_linear(old.in_features, rank), _linear(rank, old.out_features)]
    if form == "embedding":
        options = {name: getattr(old, name) for name in ("padding_idx", "scale_grad_by_freq", "sparse")}
        return [nn.Embedding(old.num_embeddings, rank, **options, device="meta"), _linear(rank, old.embedding_dim)]
    inputs, outputs, groups = old.in_channels, old.out_channels, old.groups
    first, last = groups * rank, groups * ranks[-1]
    if form == "tucker2":
        return [_pointwise(old, inputs, first), _conv(old, first, last), _pointwise(old, last, outputs)]
    if form == "spatial":
        return [_conv(old, inputs, first, axis=0), _conv(old, first, outputs, axis=1)]
    if form == "depthwise":
        first *= inputs
        return [_conv(old, inputs, first, groups=inputs), _pointwise(old, first, outputs)]
    if form == "pointwise":
        first *= outputs
        return [_pointwise(old, inputs, first), _conv(old, first, outputs, groups=outputs)]
    return [_conv(old, inputs, first), _pointwise(old, first, outputs)]


def _linear(in_features: int, out_features: int) -> nn.Linear:
    return nn.Linear(in_features, out_features, bias=False, device="meta")


def _pointwise(old: Any, in_channels: int, out_channels: int) -> Any:
    return convolution_like(old, in_channels=in_channels, out_channels=out_channels, **POINTWISE)


def _conv(old: Any, in_channels: int, out_channels: int, *, axis: int | None = None, groups: int | None = None) -> Any:
    """Make a convolution with the kernel of ``old``, or with one axis of it."""
    options: dict[str, Any] = {"groups": old.groups if groups is None else groups}
    for name in ("kernel_size", "stride", "padding", "dilation") if axis is not None else ():
        values, neutral = getattr(old, name), POINTWISE[name]
        if not isinstance(values, str):
            options[name] = tuple(value if place == axis else neutral for place, value in enumerate(values))
    return convolution_like(old, in_channels=in_channels, out_channels=out_channels, **options)


def dense_weight(module: nn.Module) -> Tensor:
    """Return the weight ``(groups, out, in, *kernel)`` of a layer, or the product of its factors."""
    form = factor_form(module)
    if form is None:
        weight: Any = module.weight
        groups: int = getattr(module, "groups", 1)
        return cast(Tensor, weight.detach().reshape(groups, len(weight) // groups, *weight.shape[1:]))
    layers: list[Any] = list(module.children())
    return compose(form, [layer.weight.detach() for layer in layers], getattr(layers[0], "groups", 1))


def current_ranks(module: nn.Module) -> tuple[int, ...]:
    """Return the ranks of a layer's factors, within a group."""
    layers: list[Any] = list(module.children())
    groups: int = getattr(layers[0], "groups", 1)
    if factor_form(module) == "embedding":
        return (layers[0].embedding_dim,)
    if factor_form(module) == "pointwise":
        return (layers[1].weight.shape[1],)
    return tuple(layer.weight.shape[0] // groups for layer in layers[:-1])
