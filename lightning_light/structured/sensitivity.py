"""Rank channels by how much the outputs change when a layer loses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_light.criteria.gated_weights import GatedWeights, ungated_writers
from lightning_light.criteria.output_distance import Distance, output_distance
from lightning_light.dependency import ChannelGroup
from lightning_light.errors import UnsupportedError
from lightning_light.example_input import ExampleInput
from lightning_light.isolation import isolated, plain_attention
from lightning_light.structured.ranking import Ranking
from lightning_light.validation import PositiveInt, validated

__all__ = ["Sensitivity", "curve_lines", "measure_curves", "order_by_curves"]


@validated
@dataclass(frozen=True)
class Sensitivity(Ranking):
    """Remove from every group as many channels as change the outputs by one common threshold.

    For each group alone, several widths are tried on a few batches, and the outputs are compared with those of the
    network as it is; no labels are used. The criterion decides which channels of a group are removed first, the curves
    decide how many of each group. The curves are measured once per run, before the first cut, and kept in checkpoints.

    FastNAS of NVIDIA Model Optimizer chooses the widths of a network by such a threshold, on the score of a validation
    set in place of the outputs. https://nvidia.github.io/Model-Optimizer/guides/3_pruning.html

    Args:
        reduction: see `Ranking`.
        normalizer: without effect: scores of different groups are not compared.
        widths: how many widths are tried per group; between them, curves are linear.
        batches: of ``data``, or of the training batches before the first cut, at most 16 samples of each.
        distance: of the outputs: ``"kl"``, the Kullback-Leibler divergence of class probabilities, or ``"mse"``, the
            squared error relative to the variance, for all other outputs.
        class_dim: which dimension counts classes: -1 for ``(N, C)`` and tokens ``(N, T, C)``, 1 for ``(N, C, H, W)``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
    """

    widths: PositiveInt = 8
    batches: PositiveInt = 4
    distance: Distance = "kl"
    class_dim: int = -1

    @override
    def scope(self, group: ChannelGroup, model: nn.Module) -> str:
        return "all"


def measure_curves(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    ranking: Sensitivity,
    calls: Sequence[ExampleInput],
) -> dict[str, Tensor]:
    """Measure how much the outputs change when one group loses its channels with the lowest scores.

    Args:
        model: left as it is.
        groups: the groups that may lose channels.
        scores: group name -> one score per channel.
        ranking: how the outputs are compared.
        calls: of the model, one per batch.

    Returns:
        Group name -> distance of the outputs without 0, 1, ... ``width - 1`` channels, shape ``(width,)``, not falling.

    Raises:
        UnsupportedError: there are no ``calls``.
    """
    if not calls:
        raise UnsupportedError(
            f"`ranking={ranking!r}`: expected inputs of the network, found none. Pass `data=train_dataloader` to "
            "`prune_channels`; with `StructuredPruning`, call `self(...)` in `training_step`."
        )
    gated = GatedWeights(model, groups, ungated_writers(model, groups, calls[0].small()))
    starts = [int((gated.owner < number).sum()) for number in range(len(groups))]
    with isolated(model), plain_attention():
        plain = [model(*call.args, **call.kwargs) for call in calls]
        measured = zip(groups, starts, strict=True)
        return {g.name: _curve(gated, start, scores[g.name], ranking, calls, plain) for g, start in measured}


def _curve(
    gated: GatedWeights,
    start: int,
    scores: Tensor,
    ranking: Sensitivity,
    calls: Sequence[ExampleInput],
    plain: Sequence[object],
) -> Tensor:
    order, last = torch.argsort(scores, stable=True) + start, scores.numel() - 1
    tried = sorted({round(last * (i + 1) / ranking.widths) for i in range(ranking.widths)} - {0})
    found = torch.zeros(last + 1, dtype=torch.double)
    before, value = 0, 0.0
    for removed in tried:
        gates = torch.ones(gated.count, device=gated.device)
        gates[order[:removed]] = 0.0
        pairs = ((gated.call(gates, call), output) for call, output in zip(calls, plain, strict=True))
        distances = [output_distance(a, b, ranking.distance, ranking.class_dim) for a, b in pairs]
        now = max(value, float(torch.stack(distances).mean()))
        found[before : removed + 1] = torch.linspace(value, now, removed + 1 - before, dtype=torch.double)
        before, value = removed, now
    return found


def order_by_curves(groups: Sequence[ChannelGroup], curves: Mapping[str, Tensor]) -> Tensor:
    """Return the index of the group that loses a channel next, by the distance that its curve has without it.

    Args:
        groups: the groups that may lose channels.
        curves: as `measure_curves` returns them, perhaps for wider groups.
    """
    keys, numbers = [], []
    for number, group in enumerate(groups):
        without_more = curves[group.name][-group.width :][1:]
        keys.append(torch.cat([without_more, torch.tensor([torch.inf], dtype=torch.double)]))
        numbers.append(torch.full((group.width,), number))
    return torch.cat(numbers)[torch.argsort(torch.cat(keys), stable=True)]


def curve_lines(curves: Mapping[str, Tensor], points: int = 4) -> list[str]:
    """Describe the curves, one line per group: the distance at ``points`` fractions of its channels.

    >>> curve_lines({"conv1": torch.tensor([0.0, 0.1, 0.4, 1.6, 6.4])}, points=2)
    ['conv1: 5 channels, 0.4 without 2, 6.4 without 4']
    """
    lines = []
    for name, curve in curves.items():
        last = curve.numel() - 1
        places = sorted({round(last * (i + 1) / points) for i in range(points)} - {0})
        texts = ", ".join(f"{float(curve[place]):.3g} without {place}" for place in places)
        lines.append(f"{name}: {last + 1} channels, {texts}")
    return lines
