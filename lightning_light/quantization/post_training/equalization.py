"""Cross-layer equalization: balance the weight ranges of consecutive layers without changing the function.

Nagel, van Baalen, Blankevoort, Welling, 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction".
https://arxiv.org/abs/1906.04721
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_light.example_input import ExampleInput
from lightning_light.quantization.fake_quantize import gain_and_shift
from lightning_light.quantization.trace import OpNode, trace_ops, writable_parameters

__all__ = ["Pair", "equalize", "equalizing_scales", "find_pairs"]

_SWEEPS = 100  # over chains of layers; most are done after ten
_DONE = 1e-4
_ELEMENTWISE = frozenset({"relu", "relu_", "leaky_relu", "leaky_relu_", "prelu", "dropout", "dropout_", "contiguous"})
_RESHAPING = frozenset({"flatten", "view", "reshape"})
_SPATIAL = frozenset({"max_pool1d", "max_pool2d", "adaptive_max_pool2d", "dropout1d", "dropout2d"})


def equalizing_scales(first: Tensor, second: Tensor) -> Tensor:
    """``s_i = sqrt(r1_i * r2_i) / r2_i``: dividing the first range by it and multiplying the second makes them equal.

    Args:
        first: ``(channels,)``, ``r1``: the range of each output channel of the first layer.
        second: ``(channels,)``, ``r2``: the range of the weights that read the channel.

    Returns:
        The scales; 1 where a channel is dead on either side.

    Example:
        >>> equalizing_scales(torch.tensor([8.0, 1.0, 0.0]), torch.tensor([2.0, 4.0, 3.0])).tolist()
        [2.0, 0.5, 1.0]
    """
    alive = (first > 0) & (second > 0)
    return torch.where(alive, (first * second).sqrt() / torch.where(alive, second, 1.0), 1.0)


@dataclass
class Pair:
    """Two layers of which the second alone reads the first, through operators that a positive scale commutes with.

    Attributes:
        first: a layer.
        batch_norm: after it, which takes the scale instead of its weight.
        second: a layer.
        columns: how many inputs of the second one channel of the first is; more than one after flattening.
        divided: names of the weight and the bias that are divided by the scale.
        multiplied: name of the weight that is multiplied by it.
        made: name of the weight of the first layer; None if it is computed.
    """

    first: OpNode
    batch_norm: OpNode | None
    second: OpNode
    columns: int
    divided: list[str]
    multiplied: str
    made: str | None

    def equalize(self, values: dict[str, Tensor]) -> float:
        """Scale ``values`` in place; returns how far the farthest scale was from 1."""
        made = self.first.named["weight"].detach().double() if self.made is None else values[self.made]
        first = _over(made, self.first, outputs=True).abs().amax((1, 3)).flatten()
        if self.batch_norm is not None:
            first = first * gain_and_shift({**self.batch_norm.named, "weight": values[self.divided[0]]})[0].abs()
        read = _over(values[self.multiplied], self.second, outputs=False)
        second = read.abs().amax((1, 3)).reshape(-1, self.columns).amax(1)
        scales = equalizing_scales(first, second)
        for name in self.divided:
            rows = values[name] if values[name].dim() == 1 else _over(values[name], self.first, outputs=True)
            rows.div_(scales if rows.dim() == 1 else scales.reshape(rows.shape[0], 1, rows.shape[2], 1))
        read.mul_(scales.repeat_interleave(self.columns).reshape(read.shape[0], 1, read.shape[2], 1))
        return float((scales - 1).abs().max())


def equalize(model: nn.Module, example: ExampleInput) -> int:
    """Equalize every pair of layers of ``model`` in place, until nothing changes. The function it computes stays.

    Returns:
        How many pairs there were.
    """
    trace = trace_ops(model, example.args, example.kwargs)
    pairs = find_pairs(trace.nodes, writable_parameters(model, trace))
    written = dict(model.named_parameters())
    names = {name for pair in pairs for name in (*pair.divided, pair.multiplied, pair.made) if name is not None}
    values = {name: written[name].detach().double().clone(memory_format=torch.contiguous_format) for name in names}
    for _ in range(_SWEEPS):
        if max([pair.equalize(values) for pair in pairs], default=0.0) < _DONE:
            break
    with torch.no_grad():
        for name, value in values.items():
            written[name].copy_(value)
    return len(pairs)


def find_pairs(nodes: Sequence[OpNode], parameters: Mapping[Any, str]) -> list[Pair]:
    """The pairs in order: through batch norm, ReLU, leaky ReLU, pooling and flattening, but not through ReLU6.

    Args:
        nodes: of one forward pass.
        parameters: which of them can be written.
    """
    return [pair for node in nodes if node.role == "layer" and (pair := _pair_of(node, parameters)) is not None]


def _pair_of(first: OpNode, parameters: Mapping[Any, str]) -> Pair | None:
    """The pair that begins with a layer, if all that has to be scaled are parameters that nothing else reads."""
    batch_norm, before, second = None, first, first.only_user
    while second is not None and second.role != "layer":
        if second.role == "batch_norm" and before is first:
            batch_norm = second
        elif not (second.id.function in _ELEMENTWISE or _is_relu(second) or _keeps_channels(first, before, second)):
            return None
        before, second = second, second.only_user
    if second is None or not (columns := _columns(first, second)):
        return None
    scaled = (first if batch_norm is None else batch_norm).named
    keys = ("weight",) if batch_norm is None and scaled.get("bias") is None else ("weight", "bias")
    divided = [name for key in keys if (name := parameters.get(scaled.get(key))) is not None]
    multiplied = parameters.get(second.named["weight"])
    has_statistics = batch_norm is None or scaled.get("running_var") is not None
    if multiplied is None or len(divided) < len(keys) or not has_statistics:
        return None
    made = parameters.get(first.named["weight"])
    return Pair(first, batch_norm, second, columns, divided, multiplied, made)


def _is_relu(node: OpNode) -> bool:
    return node.operator.name == "relu" or node.bounds == (0, None)


def _keeps_channels(first: OpNode, before: OpNode, node: OpNode) -> bool:
    """Whether a pooling or reshaping operator keeps the channels of a convolution second, each in one piece."""
    if first.operator.name == "linear":
        return False
    if node.role == "average" or node.id.function in _SPATIAL:
        return True
    result = node.call.result
    return bool(node.id.function in _RESHAPING and result.dim() == 2 and result.shape[0] == before.call.result.shape[0])


def _columns(first: OpNode, second: OpNode) -> int:
    """How many inputs of ``second`` each channel of ``first`` is; 0 if they do not fit."""
    x, weight, result = second.named["input"], second.named["weight"], first.call.result
    if second.operator.name == "linear":
        if first.operator.name != "linear" and x.dim() != 2:
            return 0  # it reads the last dimension, which is spatial
        inputs = weight.shape[1]
    elif first.operator.name == "linear" or x.dim() != weight.dim() or result.dim() != x.dim():
        return 0
    else:
        inputs = x.shape[1]
    channels = result.shape[first.channel_dim]
    return int(inputs // channels) if inputs % channels == 0 else 0


def _over(weight: Tensor, node: OpNode, *, outputs: bool) -> Tensor:
    """``(groups, others, channels per group, kernel)``: the channels that a layer makes, or those that it reads."""
    if outputs == (node.operator.name != "conv_transpose"):  # they are rows
        return weight.reshape(1, 1, weight.shape[0], -1)
    groups = int(node.named.get("groups", 1))
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
