"""Placeholders: tensors of the right shape whose values a trace does not compute, because only shapes matter to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["PRODUCTS", "PRODUCT_FUNCTIONS", "Placeholders", "ValueNeededError"]

PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "convolution"})
"""ATen operations that are not computed."""

PRODUCT_FUNCTIONS = frozenset(
    {"linear", "matmul", "bmm", "mm", "addmm", "baddbmm", "scaled_dot_product_attention"}
    | {f"conv{dims}d" for dims in (1, 2, 3)}
    | {f"conv_transpose{dims}d" for dims in (1, 2, 3)}
)
"""Functions of torch's Python interface that are not computed."""

_SCALAR_READS = {"_local_scalar_dense", "equal", "is_nonzero", "tolist", "numpy", "__array__"}
_SIZE_READS = {"nonzero", "masked_select", "bincount", "repeat_interleave", "_unique", "_unique2", "unique_dim"}
_VALUE_READS = _SCALAR_READS | _SIZE_READS | {"unique_consecutive"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class ValueNeededError(Exception):
    """The traced code reads a value that was not computed."""


class Placeholders:
    """The tensors of one pass whose values were not computed, or depend on such values."""

    def __init__(self) -> None:
        self._tensors: MutableMapping[Tensor, bool] = WeakIdKeyDictionary()

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Mark ``tensors`` as placeholders."""
        for tensor in tensors:
            self._tensors[tensor] = True

    def among(self, tensors: Iterable[Tensor]) -> bool:
        """Check whether any of ``tensors`` is a placeholder."""
        return any(tensor in self._tensors for tensor in tensors)

    def check_read(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Raise `ValueNeededError` if the operation ``name`` reads values of a placeholder among ``tensors``."""
        masks = [x for x in tensors[1:] if x.dtype in (torch.bool, torch.uint8)] if name in _INDEXING else []
        if self.among(tensors if name in _VALUE_READS else masks):
            raise ValueNeededError(name)

    def product(self, name: str, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """Return zeros of the shape that a product has; None if it has to be computed.

        The shape comes from torch's meta kernels, which raise where the operands do not fit.
        """
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if not all(type(x) in (Tensor, nn.Parameter) and x.is_floating_point() for x in tensors):
            return None
        meta = _on_meta(name, function, args, kwargs)
        if meta is None:
            return None
        zeros = torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype, device=tensors[0].device).zero_()
        self.add([zeros])
        return zeros


def _on_meta(name: str, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Run a product without its bias, for which torch's meta kernels are slow, on the meta device."""
    moved = [x.to("meta") if isinstance(x, Tensor) else x for x in args]
    if name == "scaled_dot_product_attention":
        if len(args) != 3 or kwargs.get("enable_gqa"):
            return None
        scores, mask = moved[0] @ moved[1].transpose(-1, -2), kwargs.get("attn_mask")
        return (scores if mask is None else mask.to("meta").expand(scores.shape)) @ moved[2]
    if kwargs:
        return None
    if name == "linear":
        out, bias = nn.functional.linear(*moved[:2]), moved[2] if len(moved) > 2 else None
    elif name in {"addmm", "baddbmm"}:
        out, bias = torch.matmul(*moved[1:3]), moved[0]
    else:
        out, bias = function(*moved), None
    if bias is not None:
        torch.broadcast_shapes(bias.shape, out.shape)  # type: ignore[no-untyped-call]  # torch's own signature
    return out
