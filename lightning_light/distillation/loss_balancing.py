"""Losses of different size, brought to one size by what they do to the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["gradient_factors"]


def gradient_factors(
    task: Tensor, terms: Sequence[Tensor], parameters: Sequence[nn.Parameter], reduce: Callable[[Tensor], Tensor]
) -> Tensor:
    """For each term the factor at which its gradient is as long as the task's; 1 where a term has no gradient.

    Args:
        task: the task's loss.
        terms: the other losses, with their graphs, which stay.
        parameters: with respect to which gradients are taken.
        reduce: the mean over processes.
    """
    lengths = torch.stack([_length(loss, parameters) for loss in (task, *terms)])
    lengths = reduce(lengths)
    factors = lengths[0] / lengths[1:]
    return torch.where(factors.isfinite() & (factors > 0), factors, torch.ones_like(factors))


def _length(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    squares = [gradient.detach().float().square().sum() for gradient in gradients if gradient is not None]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), device=loss.device)
