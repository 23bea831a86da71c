"""Normalizations, pooling, reductions and constants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_light.dependency.context import TraceContext
from lightning_light.dependency.labels import varying
from lightning_light.dependency.rules.table import elementwise, outputs_of, rule, unknown

__all__: list[str] = []


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "_batch_norm_no_update",
    "_batch_norm_with_update",
)
def _batch_normed(t: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    _normed(t, args[0], 1, args[1:5], "num_features", out)


@rule("native_layer_norm", "_fused_rms_norm")
def _layer_normed(t: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    if len(args[1]) > 1:
        return unknown(t, name, args, kwargs, out)
    return _normed(t, args[0], args[0].dim() - 1, args[2:4], "normalized_shape", out)


@rule("native_group_norm")
def _group_normed(t: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Groups stay, and the same positions leave each."""
    channels = t.along(args[0], 1)
    if channels is not None:
        parts = channels.view(args[6], -1)
        t.book.merge(parts, parts[:1])
    _normed(t, args[0], 1, args[1:3], "num_channels", out)


def _normed(t: TraceContext, source: Tensor, dim: int, vectors: Sequence[Any], attribute: str, out: Any) -> None:
    """Scale, shift and statistics are the source's channels."""
    channels = t.along(source, dim)
    for vector in vectors:
        if isinstance(vector, Tensor) and vector.numel() > 1:
            t.couple(channels, t.along(vector, 0), "normalizes a tensor of fixed size (for instance the input)")
    t.tie(attribute, channels)
    t.give(outputs_of(out)[0], t.marks(source))


@rule(
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "adaptive_max_pool2d",
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
    "reflection_pad1d",
    "reflection_pad2d",
    "replication_pad1d",
    "replication_pad2d",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "upsample_bilinear2d",
    "upsample_linear1d",
    "upsample_trilinear3d",
    "upsample_bicubic2d",
    "grid_sampler_2d",
    "_upsample_bilinear2d_aa",
    "_upsample_nearest_exact2d",
)
def _over_space(t: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Space changes, channels pass."""
    channels = [mark for mark in t.marks(args[0]) if varying(mark) == (1,)]
    for mark in t.marks(args[0]):
        if varying(mark) != (1,):
            t.book.protect(mark, f"`{name}` mixes it over space")
    for tensor in outputs_of(out):
        t.give(tensor, channels)


@rule(
    "mean",
    "sum",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "norm",
    "linalg_vector_norm",
    "amax",
    "amin",
    "prod",
    "logsumexp",
    "max",
    "min",
    "nansum",
)
def _reduced(t: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """A reduced dimension is consumed, the others pass."""
    if len(args) > 1 and isinstance(args[1], Tensor):
        return elementwise(t, name, args, kwargs, out)
    source = args[0]
    dims = _reduced_dims(name, args, kwargs, source.dim())
    for tensor in outputs_of(out):
        kept = []
        for mark in t.marks(source):
            if not set(varying(mark)) & set(dims):
                kept.append(mark if tensor.dim() == source.dim() else mark.squeeze(tuple(dims)))
            elif not tensor.is_floating_point():
                t.give_indices(tensor, [mark])
        t.give(tensor, kept)
    return None


def _reduced_dims(name: str, args: Sequence[Any], kwargs: dict[str, Any], rank: int) -> tuple[int, ...]:
    place = 2 if name in {"norm", "linalg_vector_norm"} else 1
    given = kwargs.get("dim", args[place] if len(args) > place else None)
    if given is None or given == []:
        return tuple(range(rank))
    return tuple(int(dim) % rank for dim in (given if isinstance(given, (list, tuple)) else [given]))


@rule("_weight_norm_interface")
def _weight_normed(t: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """``g * v / |v|``: direction and length have the same channels."""
    elementwise(t, name, args[:2], {}, out[0])


@rule(
    "empty",
    "zeros",
    "ones",
    "full",
    "arange",
    "new_zeros",
    "new_empty",
    "new_ones",
    "new_full",
    "scalar_tensor",
    "rand",
    "randn",
    "_local_scalar_dense",
    "linspace",
    "eye",
)
def _constant(t: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """A constant has no channels; but the first state of a recurrent layer follows its ``hidden_size``."""
    if t.in_recurrent_layer() and isinstance(out, Tensor) and out.dim() and out.shape[-1] > 1:
        t.give(out, [t.book.fresh(out.shape[-1]).reshape((1,) * (out.dim() - 1) + (-1,))])
