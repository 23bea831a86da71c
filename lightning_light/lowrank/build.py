"""Build the factor layers that replace a layer, and register the edit log's operation that replays them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_light.lowrank.factors import Factors, compose, factor_form
from lightning_light.lowrank.splitting import split_module
from lightning_light.surgery.operations import register_operation
from lightning_light.surgery.replace import put_module

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
_CONVOLUTIONS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

Conv = nn.modules.conv._ConvNd


def build_factors(old: nn.Module, form: str, ranks: Sequence[int], weights: Sequence[Tensor] = ()) -> Factors:
    """Build the factors of ``old`` without drawing random numbers.

    Args:
        old: a layer, or the factors of a layer, whose ranks are to be lowered.
        form: see `lightning_light.lowrank.spectra.Spectrum`.
        ranks: within a group.
        weights: of the factors, in order; without them the weights stay on ``meta``, for a replay.
    """
    makers: dict[str, Callable[..., list[Any]]] = {
        "linear": _linear,
        "embedding": _embedding,
        "channel": _channel,
        "spatial": _spatial,
        "tucker2": _tucker,
        "depthwise": _depthwise,
        "pointwise": _pointwise,
    }
    layers = makers[form](old, *ranks)
    last = old[-1] if isinstance(old, nn.Sequential) else old
    layers[-1].bias = getattr(last, "bias", None)  # the same object: its optimizer state and its average stay
    reference = last.weight
    assert isinstance(reference, Tensor)
    for layer, weight in zip(layers, weights, strict=False):
        value = weight.to(device=reference.device, dtype=reference.dtype).contiguous()
        layer.weight = nn.Parameter(value, requires_grad=reference.requires_grad)
    if not weights:
        for layer in layers:
            layer.weight = nn.Parameter(layer.weight.detach().to(reference.dtype), reference.requires_grad)
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
        put_module(model, name, build_factors(model.get_submodule(name), form, ranks))
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


def _ends(old: nn.Module) -> tuple[Any, Any]:
    """Return the layers that read the input and write the output: the layer itself, or its first and last factor."""
    return (old[0], old[-1]) if isinstance(old, nn.Sequential) else (old, old)


def _linear(old: Any, rank: int) -> list[Any]:
    first, last = _ends(old)
    return [
        nn.Linear(first.in_features, rank, bias=False, device="meta"),
        nn.Linear(rank, last.out_features, bias=False, device="meta"),
    ]


def _embedding(old: Any, rank: int) -> list[Any]:
    table, last = _ends(old)
    width = last.embedding_dim if last is table else last.out_features
    words = nn.Embedding(
        table.num_embeddings,
        rank,
        padding_idx=table.padding_idx,
        scale_grad_by_freq=table.scale_grad_by_freq,
        sparse=table.sparse,
        device="meta",
    )
    return [words, nn.Linear(rank, width, bias=False, device="meta")]


def _channel(old: Any, rank: int) -> list[Any]:
    first, last = _ends(old)
    return [
        _conv(first, first.in_channels, first.groups * rank, like=first),
        _conv(first, first.groups * rank, last.out_channels),
    ]


def _spatial(old: Any, rank: int) -> list[Any]:
    first, last = _ends(old)
    middle = first.groups * rank
    return [
        _conv(first, first.in_channels, middle, like=first, axis=0),
        _conv(first, middle, last.out_channels, like=last, axis=1),
    ]


def _tucker(old: Any, inputs: int, outputs: int) -> list[Any]:
    first, last = _ends(old)
    core: Any = old[1] if isinstance(old, nn.Sequential) else old
    before, after = core.groups * inputs, core.groups * outputs
    return [
        _conv(core, first.in_channels, before),
        _conv(core, before, after, like=core),
        _conv(core, after, last.out_channels),
    ]


def _depthwise(old: Any, rank: int) -> list[Any]:
    first, last = _ends(old)
    inputs = first.in_channels
    return [
        _conv(first, inputs, inputs * rank, like=first, groups=inputs),
        _conv(first, inputs * rank, last.out_channels, groups=1),
    ]


def _pointwise(old: Any, rank: int) -> list[Any]:
    first, last = _ends(old)
    outputs = last.out_channels
    return [
        _conv(first, first.in_channels, outputs * rank, groups=1),
        _conv(first, outputs * rank, outputs, like=last, groups=outputs),
    ]


def _conv(
    layer: Conv,
    in_channels: int,
    out_channels: int,
    *,
    like: Conv | None = None,
    axis: int | None = None,
    groups: int | None = None,
) -> Any:
    """Make a 1x1 convolution in the groups of ``layer``, or one with the kernel of ``like`` or of one axis of it."""
    make: Any = _CONVOLUTIONS[len(layer.kernel_size) - 1]
    groups = layer.groups if groups is None else groups
    if like is None:
        return make(in_channels, out_channels, 1, groups=groups, bias=False, device="meta")
    kernel, stride, dilation, padding = like.kernel_size, like.stride, like.dilation, like.padding
    if axis is not None:
        kernel, stride, dilation = (_along(axis, values, 1) for values in (kernel, stride, dilation))
        padding = padding if isinstance(padding, str) else _along(axis, padding, 0)
    options: Any = {"stride": stride, "padding": padding, "dilation": dilation, "padding_mode": like.padding_mode}
    return make(in_channels, out_channels, kernel, groups=groups, bias=False, device="meta", **options)


def _along(axis: int, values: Sequence[int], neutral: int) -> tuple[int, ...]:
    return tuple(value if index == axis else neutral for index, value in enumerate(values))


def dense_weight(module: nn.Module) -> Tensor:
    """Return the weight ``(groups, out, in, *kernel)`` of a layer, or the product of its factors."""
    form = factor_form(module)
    if form is None:
        return _grouped(module, module.weight)  # type: ignore[arg-type]  # a parameter
    layers: list[Any] = list(module.children())
    return compose(form, [layer.weight.detach() for layer in layers], getattr(layers[0], "groups", 1))


def _grouped(module: nn.Module, weight: Tensor) -> Tensor:
    groups: int = getattr(module, "groups", 1)
    return weight.detach().reshape(groups, weight.shape[0] // groups, *weight.shape[1:])


def current_ranks(module: nn.Module) -> tuple[int, ...]:
    """Return the ranks of a layer's factors, within a group."""
    layers: list[Any] = list(module.children())
    groups: int = getattr(layers[0], "groups", 1)
    if factor_form(module) == "embedding":
        return (layers[0].embedding_dim,)
    if factor_form(module) == "pointwise":
        return (layers[1].weight.shape[1],)
    return tuple(layer.weight.shape[0] // groups for layer in layers[:-1])
