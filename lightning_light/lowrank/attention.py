"""Layers that hold several matrices in one tensor, opened: each matrix is a layer of its own, and can be factored."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

__all__ = ["Blocks", "OpenAttention", "followers", "open_module", "opened_weights", "why_closed"]

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class Blocks(nn.Module):
    """A fused linear layer (query, key and value in one) as several, side by side; the output is the same.

    Args:
        blocks: linear layers, or factors of such, that read the same input.
    """

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([block(x) for block in self.blocks], dim=-1)


class OpenAttention(nn.Module):
    """`torch.nn.MultiheadAttention` with its four projections as layers; the same arguments, the same answers.

    Args:
        old: the attention that it takes the place of.
        layers: ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``.
    """

    def __init__(self, old: nn.MultiheadAttention, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = old.embed_dim, old.num_heads, old.head_dim
        self.dropout, self.batch_first = old.dropout, old.batch_first
        self.in_proj_bias, self._qkv_same_embed_dim = None, False  # what torch's encoders ask before their fast path
        self.q_proj, self.k_proj = layers["q_proj"], layers["k_proj"]
        self.v_proj, self.out_proj = layers["v_proj"], layers["out_proj"]

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
            mixed = weights @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        shown = (weights.mean(1) if average_attn_weights else weights) if need_weights else None
        if not batched:
            return out[0], None if shown is None else shown[0]
        return out if self.batch_first else out.transpose(0, 1), shown

    def _mask(self, padding: Tensor | None, mask: Tensor | None, query: Tensor) -> Tensor | None:
        """Both masks as one that is added to the scores ``(batch, heads, query, key)``."""
        if mask is not None:
            mask = _additive(mask, query)
            mask = mask.reshape(-1, self.num_heads, *mask.shape[1:]) if mask.dim() == 3 else mask
        if padding is not None:
            padding = _additive(padding if padding.dim() == 2 else padding[None], query)[:, None, None, :]
            mask = padding if mask is None else mask + padding
        return mask


def opened_weights(module: nn.Module, blocks: int = 0) -> dict[str, Tensor]:
    """Name of the layer inside -> the weight that it would have, if ``module`` were opened."""
    if not isinstance(module, nn.MultiheadAttention):
        return _chunks("", module.weight, blocks)  # type: ignore[arg-type]  # of a linear layer
    named = zip(_PROJECTIONS, _projections(module), strict=True)
    inner = [_chunks(f"{name}.", weight, blocks) if blocks else {name: weight} for name, weight in named]
    return {**inner[0], **inner[1], **inner[2], "out_proj": module.out_proj.weight}


def open_module(module: nn.Module, blocks: int = 0) -> OpenAttention | Blocks:
    """``module`` with a layer for each of its matrices; parameters are new, but for those of the output projection.

    Args:
        module: an attention that `why_closed` says nothing against, or a linear layer.
        blocks: in how many equal parts the outputs of a linear layer fall, or those of each projection of an attention:
            the number of heads, for one part a head. 0 leaves projections whole.
    """
    if isinstance(module, nn.MultiheadAttention):
        joint = module.in_proj_bias
        biases = [None] * 3 if joint is None else list(joint.chunk(3))
        layers: dict[str, nn.Module] = {
            name: _split(weight, bias, blocks, module.out_proj.weight)
            for name, weight, bias in zip(_PROJECTIONS, _projections(module), biases, strict=True)
        }
        layers["out_proj"] = _shared(module.out_proj)
        return OpenAttention(module, layers)
    linear: Any = module
    opened = _split(linear.weight, linear.bias, blocks, linear.weight)
    assert isinstance(opened, Blocks)
    return opened


def why_closed(module: nn.MultiheadAttention) -> str | None:
    """Why this attention cannot be opened, or None."""
    if module.bias_k is not None or module.add_zero_attn:
        return "the attention adds a key of its own (`add_bias_kv`, `add_zero_attn`)"
    return None


def _projections(module: nn.MultiheadAttention) -> list[Tensor]:
    if module.in_proj_weight is not None:
        return list(module.in_proj_weight.chunk(3))
    return [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]


def _chunks(prefix: str, weight: Tensor, blocks: int) -> dict[str, Tensor]:
    return {f"{prefix}blocks.{place}": part for place, part in enumerate(weight.chunk(blocks))}


def _split(weight: Tensor, bias: Tensor | None, blocks: int, reference: Tensor) -> nn.Linear | Blocks:
    if not blocks:
        return _layer(weight, bias, reference)
    biases = [None] * blocks if bias is None else list(bias.chunk(blocks))
    return Blocks([_layer(*part, reference) for part in zip(weight.chunk(blocks), biases, strict=True)])


def _layer(weight: Tensor, bias: Tensor | None, reference: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), reference.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), reference.requires_grad)
    return layer


def _shared(old: nn.Linear) -> nn.Linear:
    """A plain linear layer with the parameters of ``old``."""
    layer = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None, device="meta")
    layer.weight, layer.bias = old.weight, old.bias
    return layer


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


def followers(old: nn.Module, new: nn.Module) -> dict[nn.Parameter, list[nn.Parameter]]:
    """What takes the place of each parameter of ``old`` in the optimizers."""
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
    """Weights and biases of a layer, or of the blocks that stand for it."""
    layers: list[Any] = list(new.blocks) if isinstance(new, Blocks) else [new]
    return [layer.weight for layer in layers], [layer.bias for layer in layers]
