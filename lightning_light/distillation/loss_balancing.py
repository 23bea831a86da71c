"""Balance losses by the norms of their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["gradient_factors"]


def gradient_factors(
    task: Tensor, terms: Sequence[Tensor], parameters: Sequence[nn.Parameter], reduce: Callable[[Tensor], Tensor]
) -> Tensor:
    """Compute for each term the factor at which its gradient norm equals the task's; 1 where it has no gradient.

    Args:
        task: the task's loss.
        terms: the other losses, with their graphs, which are retained.
        parameters: with respect to which gradients are taken.
        reduce: the mean over processes.
    """
    norms = torch.stack([_gradient_norm(loss, parameters) for loss in (task, *terms)])
    norms = reduce(norms)
    factors = norms[0] / norms[1:]
    return torch.where(factors.isfinite() & (factors > 0), factors, torch.ones_like(factors))


def _gradient_norm(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    squares = [gradient.detach().float().square().sum() for gradient in gradients if gradient is not None]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), device=loss.device)
