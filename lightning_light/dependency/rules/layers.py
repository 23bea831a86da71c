"""Rules for normalization, pooling, reductions, and constants."""

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
def _batch_norm(context: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    _norm(context, args[0], 1, args[1:5], "num_features", out)


@rule("native_layer_norm", "_fused_rms_norm")
def _layer_norm(context: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    if len(args[1]) > 1:
        return unknown(context, name, args, kwargs, out)
    return _norm(context, args[0], args[0].dim() - 1, args[2:4], "normalized_shape", out)


@rule("native_group_norm")
def _group_norm(context: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Couple the same position of every group; the number of groups is kept."""
    channels = context.along(args[0], 1)
    if channels is not None:
        parts = channels.view(args[6], -1)
        context.union.merge(parts, parts[:1])
    _norm(context, args[0], 1, args[1:3], "num_channels", out)


def _norm(context: TraceContext, source: Tensor, dim: int, vectors: Sequence[Any], attribute: str, out: Any) -> None:
    """Couple scale, shift and statistics with the channels of the input."""
    channels = context.along(source, dim)
    for vector in vectors:
        if isinstance(vector, Tensor) and vector.numel() > 1:
            context.couple(
                channels, context.along(vector, 0), "normalizes a tensor of fixed size (for instance the model input)"
            )
    context.note_attribute(attribute, channels)
    context.set_labels(outputs_of(out)[0], context.labels_of(source))


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
def _spatial(context: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Pass channels through; spatial dimensions change."""
    channels = [label for label in context.labels_of(args[0]) if varying(label) == (1,)]
    for label in context.labels_of(args[0]):
        if varying(label) != (1,):
            context.union.protect(label, f"is mixed over spatial positions by `{name}`")
    for tensor in outputs_of(out):
        context.set_labels(tensor, channels)


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
def _reduction(context: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Drop the labels of a reduced dimension, and pass the others through."""
    if len(args) > 1 and isinstance(args[1], Tensor):
        return elementwise(context, name, args, kwargs, out)
    source = args[0]
    dims = _reduced_dims(name, args, kwargs, source.dim())
    for tensor in outputs_of(out):
        kept = []
        for label in context.labels_of(source):
            if not set(varying(label)) & set(dims):
                kept.append(label if tensor.dim() == source.dim() else label.squeeze(tuple(dims)))
            elif not tensor.is_floating_point():
                context.set_indices(tensor, [label])
        context.set_labels(tensor, kept)
    return None


def _reduced_dims(name: str, args: Sequence[Any], kwargs: dict[str, Any], rank: int) -> tuple[int, ...]:
    place = 2 if name in {"norm", "linalg_vector_norm"} else 1
    given = kwargs.get("dim", args[place] if len(args) > place else None)
    if given is None or given == []:
        return tuple(range(rank))
    return tuple(int(dim) % rank for dim in (given if isinstance(given, (list, tuple)) else [given]))


@rule("_weight_norm_interface")
def _weight_norm(context: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Couple direction and length of ``g * v / |v|``."""
    elementwise(context, name, args[:2], {}, out[0])


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
def _constant(context: TraceContext, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Give a constant no labels, except where a number of the module states its size: the first state of a recurrence.

    What a layer computes from that state then determines what the labels stand for.
    """
    if isinstance(out, Tensor) and out.dim() and out.is_floating_point() and context.states_size(out.shape[-1]):
        context.set_labels(out, [context.union.new(out.shape[-1]).reshape((1,) * (out.dim() - 1) + (-1,))])
