"""Counting zeros: how many there are, which outputs they have left without a weight, how masks move."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

__all__ = ["dead_outputs", "facing", "mask_churn", "zero_fraction", "zero_rows"]

_TABLES = (nn.Embedding, nn.EmbeddingBag)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def facing(layer: nn.Module, weight: Tensor) -> Tensor:
    """A weight of ``layer`` as ``(out, in, *kernel)``; its own inverse. Transposed convolutions store it otherwise."""
    return weight.transpose(0, 1) if isinstance(layer, _TRANSPOSED) else weight


def zero_fraction(tensors: Iterable[Tensor]) -> float:
    """Fraction of zero (or False) elements over all ``tensors``, in [0, 1]; 0 if there are none."""
    elements = zeros = 0
    for tensor in tensors:
        elements += tensor.numel()
        zeros += tensor.numel() - int(tensor.count_nonzero())
    return zeros / elements if elements else 0.0


def zero_rows(tensor: Tensor) -> int:
    """How many entries along the first axis hold nothing but zeros (or False)."""
    return int((tensor.reshape(len(tensor), -1) == 0).all(dim=1).sum())


def dead_outputs(layer: nn.Module, weights: Iterable[Tensor]) -> int:
    """How many outputs of ``layer`` have no weight left; a table of vectors has no outputs in this sense."""
    if isinstance(layer, _TABLES):
        return 0
    return sum(zero_rows(facing(layer, weight)) for weight in weights if weight.ndim > 1)


def mask_churn(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> float:
    """Share of mask entries that are not what they were. A mask that is missing on one side leaves everything.

    Masks that have another shape by now, because channels left, are not compared.

    Example:
        >>> import torch
        >>> mask_churn({}, {"weight": torch.tensor([True, True, False, True])})
        0.25
    """
    changed = total = 0
    for name in before.keys() | now.keys():
        old, new = before.get(name), now.get(name)
        if old is not None and new is not None and old.shape != new.shape:
            continue
        if old is None or new is None:
            only = new if old is None else old
            assert only is not None  # the name is of one of the two
            changed += only.numel() - int(only.count_nonzero())
        else:
            only = new
            changed += int((old.to(new.device) != new).sum())
        total += only.numel()
    return changed / total if total else 0.0
