"""Split attentions and fused linear layers into one layer per matrix, so that each matrix can be factorized alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_light.surgery.effective import EffectiveLayer

__all__ = ["SplitLinear", "SplitAttention", "replacing_parameters", "split_module", "split_weights", "why_unsplittable"]

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class SplitLinear(EffectiveLayer):
    """Compute a fused linear layer (query, key and value in one) as several layers with concatenated outputs.

    Args:
        parts: linear layers, or their factors, that read the same input.
    """

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)

    @override
    def effective(self, name: str) -> tuple[Callable[[], Tensor], Sequence[int], Tensor] | None:
        return _joined(list(self.parts), name)

    @override
    def read(self, name: str) -> Any:
        if name == "out_features":
            return sum(part.out_features for part in self.parts)
        return self.parts[0].in_features if name == "in_features" else super().read(name)


class SplitAttention(EffectiveLayer):
    """Compute `torch.nn.MultiheadAttention` with its four projections as layers; arguments and outputs are the same.

    Args:
        old: the attention to replace.
        layers: ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``.
    """

    def __init__(self, old: nn.MultiheadAttention, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = old.embed_dim, old.num_heads, old.head_dim
        self.dropout, self.batch_first = old.dropout, old.batch_first
        self._qkv_same_embed_dim = False  # read by torch's encoders before they take their fast path
        self.bias_k, self.bias_v, self.add_zero_attn = None, None, False
        self.q_proj, self.k_proj = layers["q_proj"], layers["k_proj"]
        self.v_proj, self.out_proj = layers["v_proj"], layers["out_proj"]

    @property
    def in_proj_weight(self) -> Any:
        """The joint weight of the projections, as in `EffectiveLayer`, or None where their inputs differ in width."""
        return self.effective_tensor("weight") if self.kdim == self.vdim == self.embed_dim else None

    @property
    def in_proj_bias(self) -> Any:
        """The joint bias of the projections, as in `EffectiveLayer`, or None."""
        return self.effective_tensor("bias")

    @override
    def effective(self, name: str) -> tuple[Callable[[], Tensor], Sequence[int], Tensor] | None:
        return _joined([getattr(self, projection) for projection in _PROJECTIONS], name)

    @override
    def read(self, name: str) -> Any:
        widths = {"kdim": self.k_proj, "vdim": self.v_proj}
        return widths[name].in_features if name in widths else super().read(name)

    @override
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        batched = query.dim() == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        mask = self._mask(key_padding_mask, attn_mask, query)
        q, k, v = (
            layer(x).reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2)
            for layer, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.transpose(-2, -1) / self.head_dim**0.5
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            attended = weights @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        out = self.out_proj(attended.transpose(1, 2).flatten(2))
        returned = (weights.mean(1) if average_attn_weights else weights) if need_weights else None
        if not batched:
            return out[0], None if returned is None else returned[0]
        return out if self.batch_first else out.transpose(0, 1), returned

    def _mask(self, padding: Tensor | None, mask: Tensor | None, query: Tensor) -> Tensor | None:
        """Combine both masks into one that is added to the scores ``(batch, heads, query, key)``."""
        if mask is not None:
            mask = _additive(mask, query)
            mask = mask.reshape(-1, self.num_heads, *mask.shape[1:]) if mask.dim() == 3 else mask
        if padding is not None:
            padding = _additive(padding if padding.dim() == 2 else padding[None], query)[:, None, None, :]
            mask = padding if mask is None else mask + padding
        return mask


def split_weights(module: nn.Module, parts: int = 0) -> dict[str, Tensor]:
    """Map the names of the layers that `split_module` would make to their weights."""
    if not isinstance(module, nn.MultiheadAttention):
        return _chunks("", module.weight, parts)  # type: ignore[arg-type]  # of a linear layer
    named = zip(_PROJECTIONS, _projections(module), strict=True)
    inner = [_chunks(f"{name}.", weight, parts) if parts else {name: weight} for name, weight in named]
    return {**inner[0], **inner[1], **inner[2], "out_proj": module.out_proj.weight}


def split_module(module: nn.Module, parts: int = 0) -> SplitAttention | SplitLinear:
    """Build the replacement of ``module`` that has one layer per matrix.

    Parameters are new, except those of an attention's output projection.

    Args:
        module: an attention for which `why_unsplittable` returns None, or a linear layer.
        parts: number of equal parts of the outputs of a linear layer, or of each projection of an attention: with the
            number of heads, one part per head. 0 leaves projections whole.
    """
    if isinstance(module, nn.MultiheadAttention):
        joint = module.in_proj_bias
        biases = [None] * 3 if joint is None else list(joint.chunk(3))
        layers: dict[str, nn.Module] = {
            name: _split(weight, bias, parts, module.out_proj.weight)
            for name, weight, bias in zip(_PROJECTIONS, _projections(module), biases, strict=True)
        }
        layers["out_proj"] = _linear(module.out_proj.weight, module.out_proj.bias)
        return SplitAttention(module, layers)
    linear: Any = module
    split = _split(linear.weight, linear.bias, parts, linear.weight)
    assert isinstance(split, SplitLinear)
    return split


def why_unsplittable(module: nn.MultiheadAttention) -> str | None:
    """Return why this attention cannot be split into layers, or None."""
    if module.bias_k is not None or module.add_zero_attn:
        return "the attention adds a key of its own (`add_bias_kv` or `add_zero_attn`)"
    return None


def _joined(layers: list[Any], name: str) -> tuple[Callable[[], Tensor], Sequence[int], Tensor] | None:
    """Describe the tensors ``name`` of ``layers``, one below the other, as in `EffectiveLayer.effective`."""
    parts = [getattr(layer, name) for layer in layers]
    if parts[0] is None:
        return None
    return lambda: torch.cat(parts), (sum(map(len, parts)), *parts[0].shape[1:]), parts[0]


def _projections(module: nn.MultiheadAttention) -> list[Tensor]:
    if module.in_proj_weight is not None:
        return list(module.in_proj_weight.chunk(3))
    return [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]


def _chunks(prefix: str, weight: Tensor, parts: int) -> dict[str, Tensor]:
    return {f"{prefix}parts.{index}": part for index, part in enumerate(weight.chunk(parts))}


def _split(weight: Tensor, bias: Tensor | None, parts: int, reference: Tensor) -> nn.Linear | SplitLinear:
    if not parts:
        return _layer(weight, bias, reference)
    biases = [None] * parts if bias is None else list(bias.chunk(parts))
    return SplitLinear([_layer(*part, reference) for part in zip(weight.chunk(parts), biases, strict=True)])


def _layer(weight: Tensor, bias: Tensor | None, reference: Tensor) -> nn.Linear:
    new = (
        None if one is None else nn.Parameter(one.detach().clone(), reference.requires_grad) for one in (weight, bias)
    )
    return _linear(*new)


def _linear(weight: Any, bias: Any) -> nn.Linear:
    """Make a plain linear layer of parameters."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight, layer.bias = weight, bias
    return layer


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


def replacing_parameters(old: nn.Module, new: nn.Module) -> dict[nn.Parameter, list[nn.Parameter]]:
    """Map each parameter of ``old`` to the parameters that replace it in the optimizers."""
    if not isinstance(old, nn.MultiheadAttention):
        weights, biases = _inner(new)
        bias: Any = old.bias
        return {old.weight: weights, **({} if bias is None else {bias: biases})}
    parts = [_inner(getattr(new, name)) for name in _PROJECTIONS]
    every = [[parameter for part in parts for parameter in part[kind]] for kind in (0, 1)]
    bias = {} if old.in_proj_bias is None else {old.in_proj_bias: every[1]}
    if old.in_proj_weight is not None:
        return {old.in_proj_weight: every[0], **bias}
    separate: list[Any] = _projections(old)
    return {**{weight: part[0] for weight, part in zip(separate, parts, strict=True)}, **bias}


def _inner(new: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the weights and biases of a layer, or of its parts."""
    layers: list[Any] = list(new.parts) if isinstance(new, SplitLinear) else [new]
    return [layer.weight for layer in layers], [layer.bias for layer in layers]
