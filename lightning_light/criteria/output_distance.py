"""The distance of a network's outputs from those before a change; it needs no labels."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_light.errors import UnsupportedError
from lightning_light.nested import tensors_in

__all__ = ["Distance", "exact", "output_distance"]

Distance: TypeAlias = Literal["kl", "mse"]


def output_distance(changed: Any, plain: Any, distance: Distance, class_dim: int) -> Tensor:
    """Return the distance of two outputs, summed over the floating-point tensors in them.

    Args:
        changed: output of the changed network.
        plain: output of the network as it was.
        distance: ``"kl"``, the Kullback-Leibler divergence of class probabilities, mean over all positions, or
            ``"mse"``, the squared error relative to the variance.
        class_dim: which dimension counts classes.

    Raises:
        UnsupportedError: there is no floating-point tensor.

    Example:
        >>> output_distance(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0]), "mse", -1)
        tensor(2.)
    """
    pairs = zip(tensors_in(changed), tensors_in(plain), strict=True)
    found = [_of_tensors(exact(a), exact(b), distance, class_dim) for a, b in pairs if a.is_floating_point()]
    if not found:
        raise UnsupportedError(
            "Comparison of outputs: expected a network whose output holds floating-point tensors, found "
            f"{type(changed).__name__}. Choose a criterion and a ranking that compare no outputs: `Magnitude()`, "
            "`Global()`."
        )
    return torch.stack(found).sum()


def exact(tensor: Tensor) -> Tensor:
    """Convert to single precision at least: a softmax in half precision loses small probabilities."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _of_tensors(changed: Tensor, plain: Tensor, distance: Distance, class_dim: int) -> Tensor:
    if distance == "mse":
        return (changed - plain).square().mean() / plain.var(correction=0).clamp_min(1e-12)
    p, q = (F.log_softmax(logits, dim=class_dim) for logits in (plain, changed))
    return F.kl_div(q, p, reduction="none", log_target=True).sum(class_dim).mean()
