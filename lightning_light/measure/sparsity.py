"""Count zeros, dead filters, and changes of masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

__all__ = ["dead_filters", "mask_churn", "output_first", "zero_fraction", "zero_rows"]

_TABLES = (nn.Embedding, nn.EmbeddingBag)


def output_first(layer: nn.Module, weight: Tensor) -> Tensor:
    """View a weight of ``layer`` as ``(out, in, *kernel)``: swap the first two dimensions of transposed convolutions.

    The function is its own inverse.
    """
    return weight.transpose(0, 1) if isinstance(layer, nn.modules.conv._ConvTransposeNd) else weight


def zero_fraction(tensors: Iterable[Tensor]) -> float:
    """Return the fraction of elements of all ``tensors`` that is zero or False, in [0, 1]; 0 without elements."""
    elements = zeros = 0
    for tensor in tensors:
        elements += tensor.numel()
        zeros += tensor.numel() - int(tensor.count_nonzero())
    return zeros / elements if elements else 0.0


def zero_rows(tensor: Tensor) -> int:
    """Count the entries along the first dimension that are all zero or False."""
    return int((tensor.reshape(len(tensor), -1) == 0).all(dim=1).sum())


def dead_filters(layer: nn.Module, weights: Iterable[Tensor]) -> int:
    """Count the outputs of ``layer`` whose weights are all zero; 0 for embeddings."""
    if isinstance(layer, _TABLES):
        return 0
    return sum(zero_rows(output_first(layer, weight)) for weight in weights if weight.ndim > 1)


def mask_churn(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> float:
    """Return the fraction of mask entries that has changed. A missing mask counts as one that keeps everything.

    Masks whose shapes differ, because channels were removed, are not compared.

    Example:
        >>> import torch
        >>> mask_churn({}, {"weight": torch.tensor([True, True, False, True])})
        0.25
    """
    changed = total = 0
    for name in before.keys() | now.keys():
        dense = torch.ones_like(now[name] if name in now else before[name])
        old, new = before.get(name, dense), now.get(name, dense)
        if old.shape == new.shape:
            changed += int((old.to(new.device) != new).sum())
            total += new.numel()
    return changed / total if total else 0.0
