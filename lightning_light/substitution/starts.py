"""Closed-form starts of lighter operators: from the weights of the old layer, and from its inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "assign_balanced",
    "channel_scales",
    "fit_convolution",
    "group_channels",
    "input_covariance",
    "representatives",
]

_POSITIONS = 256  # of an output image that enter a least-squares fit
_DAMPING = 1e-4  # of the mean eigenvalue of the features' covariance
_ROUNDS = 10


@torch.no_grad()
def fit_convolution(conv: nn.Conv2d, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Set the weight and the bias of ``conv`` by damped least squares; the weight it has is where damping pulls to.

    Args:
        conv: with any groups.
        inputs: its inputs, one per batch.
        outputs: what it is to compute, ``(samples, out_channels, height, width)`` each.
    """
    groups, bias = conv.groups, conv.bias is not None
    start = conv.weight.reshape(groups, conv.out_channels // groups, -1).transpose(1, 2).double()
    if conv.bias is not None:
        start = torch.cat([start, conv.bias.double().reshape(groups, 1, -1)], 1)
    covariance = start.new_zeros(groups, start.shape[1], start.shape[1])
    cross = torch.zeros_like(start)
    for x, y in zip(inputs, outputs, strict=True):
        for sample, wanted in zip(x, y, strict=True):
            features, values = _rows(conv, sample, bias), wanted.flatten(1)
            chosen = torch.arange(0, values.shape[1], -(-values.shape[1] // _POSITIONS), device=x.device)
            features = features[:, :, chosen].double()
            covariance += features @ features.transpose(1, 2)
            cross += features @ values[:, chosen].reshape(groups, -1, len(chosen)).transpose(1, 2).double()
    damping = _DAMPING * covariance.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    covariance = covariance + torch.diag_embed(damping[:, None].expand(covariance.shape[:2]))
    solved = torch.linalg.solve(covariance, cross + damping[:, None, None] * start)
    if conv.bias is not None:
        conv.bias.copy_(solved[:, -1].reshape(-1))
        solved = solved[:, :-1]
    conv.weight.copy_(solved.transpose(1, 2).reshape(conv.weight.shape))


def channel_scales(outputs: Sequence[Tensor]) -> Tensor:
    """Return the standard deviation of each channel over all batches, ``(channels,)``."""
    values = torch.cat([y.transpose(0, 1).flatten(1) for y in outputs], 1)
    deviation = values.std(1, correction=0)
    return deviation.clamp_min(1e-3 * deviation.max().clamp_min(1e-12))


def input_covariance(inputs: Sequence[Tensor]) -> Tensor:
    """Return the mean of ``x x^T`` over all positions, ``(channels, channels)``."""
    rows = torch.cat([x.transpose(0, 1).flatten(1)[:, :: max(1, x[0, 0].numel() // _POSITIONS)] for x in inputs], 1)
    return rows @ rows.T / rows.shape[1]


def assign_balanced(scores: Tensor, capacity: int) -> Tensor:
    """Assign each row to a column, at most ``capacity`` rows to one, the largest advantages first.

    Args:
        scores: ``(rows, columns)``.
        capacity: at least ``rows / columns``.

    Returns:
        Column of each row.

    Example:
        >>> assign_balanced(torch.tensor([[9.0, 1.0], [8.0, 7.0], [3.0, 2.0], [2.0, 0.0]]), 2).tolist()
        [0, 1, 1, 0]
    """
    advantage = scores - scores.mean(1, keepdim=True)
    columns = scores.shape[1]
    assigned, room = [-1] * len(scores), [capacity] * columns
    for place in advantage.flatten().argsort(descending=True, stable=True).tolist():
        row, column = divmod(place, columns)
        if assigned[row] < 0 and room[column]:
            assigned[row], room[column] = column, room[column] - 1
    return torch.tensor(assigned, device=scores.device)


def group_channels(energy: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Group inputs and outputs so that much of the energy of a layer is within groups.

    Outputs are assigned to the groups of the inputs that they depend on most, then inputs to those of the outputs, in
    turns. The best of several starts is taken.

    Args:
        energy: of each output due to each input, ``(out, in)``.
        groups: of equal size.

    Returns:
        Group of each output and of each input.
    """
    outputs, inputs = energy.shape
    generator = torch.Generator().manual_seed(0)
    best = -1.0
    for attempt in range(4):
        order = torch.arange(inputs) if attempt == 0 else torch.randperm(inputs, generator=generator)
        of_input = (order // (inputs // groups)).to(energy.device)
        for _ in range(_ROUNDS):
            of_output = assign_balanced(energy @ F.one_hot(of_input, groups).to(energy), outputs // groups)
            of_input = assign_balanced(energy.T @ F.one_hot(of_output, groups).to(energy), inputs // groups)
        kept = float(energy[of_output[:, None] == of_input].sum())
        if kept > best:
            best, found = kept, (of_output, of_input)
    return found


def representatives(correlation: Tensor, count: int) -> Tensor:
    """Choose the channels from which the others are predicted best, one at a time.

    Args:
        correlation: of all channels, ``(channels, channels)``.
        count: how many.

    Returns:
        Indices, the best first.
    """
    residual = correlation.double().clone()
    chosen: list[int] = []
    for _ in range(count):
        variance = residual.diagonal().clamp_min(1e-9)
        gain = residual.square().sum(0) / variance
        gain[chosen] = -1.0
        best = int(gain.argmax())
        chosen.append(best)
        residual = residual - residual[:, best : best + 1] @ residual[best : best + 1] / variance[best]
    return torch.tensor(chosen, device=correlation.device)


def _rows(conv: nn.Conv2d, sample: Tensor, bias: bool) -> Tensor:
    """Return what one image brings to each output position, ``(groups, features, positions)``."""
    padding = conv.padding if isinstance(conv.padding, tuple) else _same_padding(conv)
    kernel, dilation, stride = conv.kernel_size, conv.dilation, conv.stride
    patches = F.unfold(sample[None], kernel, dilation, padding, stride)[0]
    rows = patches.reshape(conv.groups, -1, patches.shape[1])
    return torch.cat([rows, torch.ones_like(rows[:, :1])], 1) if bias else rows


def _same_padding(conv: nn.Conv2d) -> tuple[int, ...]:
    if conv.padding == "valid":
        return (0, 0)
    return tuple(d * (k - 1) // 2 for k, d in zip(conv.kernel_size, conv.dilation, strict=True))
