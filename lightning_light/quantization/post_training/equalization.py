"""Cross-layer equalization: two layers in a row share out their ranges, and compute what they did.

Nagel, van Baalen, Blankevoort, Welling, 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction".
https://arxiv.org/abs/1906.04721
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_light.example_input import ExampleInput
from lightning_light.measure.isolation import isolated
from lightning_light.quantization.operations import BATCH_NORM, HEAVY, kind_of
from lightning_light.quantization.post_training.calls import Call, Parameters, batch_norm_gain, calls_of
from lightning_light.quantization.record import Operation, record

__all__ = ["Pair", "equalize", "equalizing_scales", "find_pairs"]

_SWEEPS = 100  # over chains of layers; most are done after ten
_DONE = 1e-4
_ELEMENTWISE = frozenset({"relu", "relu_", "leaky_relu", "leaky_relu_", "prelu", "dropout", "dropout_", "contiguous"})
_SPATIAL = frozenset(
    {"max_pool1d", "max_pool2d", "adaptive_max_pool2d", "dropout1d", "dropout2d", "flatten", "view", "reshape"}
)


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


@dataclass(frozen=True)
class Pair:
    """Two layers of which the second alone reads the first, through nothing that a scale could not pass.

    Attributes:
        first: operation, as in `Frames`.
        batch_norm: that follows it, which takes the scale instead of its weight.
        second: operation.
        columns: how many inputs of the second one channel of the first is; more than one after flattening.
    """

    first: str
    batch_norm: str | None
    second: str
    columns: int


def equalize(model: nn.Module, example: ExampleInput) -> int:
    """Equalize every pair of layers of ``model`` in place, until nothing moves. The function it computes stays.

    Returns:
        How many pairs there were.
    """
    with isolated(model):
        operations, calls = record(model, example.args, example.kwargs), calls_of(model, example)
    parameters = Parameters(model, calls)
    pairs = [_Weights(pair, calls, parameters) for pair in find_pairs(operations, calls, parameters)]
    written = dict(model.named_parameters())
    values = {name: written[name].detach().double() for pair in pairs for name in pair.names}
    for _ in range(_SWEEPS):
        moved = [pair.equalize(values) for pair in pairs]
        if max(moved, default=0.0) < _DONE:
            break
    with torch.no_grad():
        for name, value in values.items():
            written[name].copy_(value)
    return len(pairs)


def find_pairs(operations: Sequence[Operation], calls: Mapping[str, Call], parameters: Parameters) -> list[Pair]:
    """The pairs in order: through batch norm, ReLU, leaky ReLU, pooling and flattening, but not through ReLU6.

    Args:
        operations: of one forward pass.
        calls: the same operations.
        parameters: which of them can be written.
    """
    found = [_pair_of(operation, calls) for operation in operations if operation.kind in HEAVY]
    return [pair for pair in found if pair is not None and _is_writable(pair, calls, parameters)]


def _pair_of(operation: Operation, calls: Mapping[str, Call]) -> Pair | None:
    batch_norm, spatial = None, False
    for before, after in _chain(operation):
        if after.kind in HEAVY:
            columns = _columns(calls[operation.key], calls[after.key])
            return Pair(operation.key, batch_norm, after.key, columns) if columns else None
        if after.kind == BATCH_NORM and before is operation:
            batch_norm = after.key
            continue
        spatial = operation.kind != "linear" and _keeps_channels(after, calls[before.key], calls[after.key])
        if not (spatial or after.name in _ELEMENTWISE or _is_relu(after)):
            return None
    return None


def _chain(operation: Operation) -> Iterator[tuple[Operation, Operation]]:
    """Each operation with the only one that reads it."""
    while len(operation.users) == 1 and not operation.is_output:
        yield operation, operation.users[0]
        operation = operation.users[0]


def _is_relu(operation: Operation) -> bool:
    return operation.kind == "relu" or (operation.kind == "clamp" and operation.bounds == (0.0, None))


def _keeps_channels(operation: Operation, before: Call, call: Call) -> bool:
    """Whether a pooling or reshaping operation keeps channels second, each in one piece."""
    if operation.kind == "pool":
        return True
    if operation.name not in _SPATIAL:
        return False
    if kind_of(operation.name) == "move" and operation.name in {"flatten", "view", "reshape"}:
        return bool(call.result.dim() == 2 and call.result.shape[0] == before.result.shape[0])
    return True


def _columns(first: Call, second: Call) -> int:
    """How many inputs of ``second`` each channel of ``first`` is; 0 if they do not fit."""
    x, weight = second.named["input"], second.named["weight"]
    if kind_of(second.name) == "linear":
        if kind_of(first.name) != "linear" and x.dim() != 2:
            return 0  # it reads the last dimension, which is space
        inputs = weight.shape[1]
    elif kind_of(first.name) == "linear" or x.dim() != weight.dim() or first.result.dim() != x.dim():
        return 0
    else:
        inputs = x.shape[1]
    channels = first.result.shape[first.channels]
    return int(inputs // channels) if inputs % channels == 0 else 0


def _is_writable(pair: Pair, calls: Mapping[str, Call], parameters: Parameters) -> bool:
    first, second = calls[pair.first].named, calls[pair.second].named
    scaled = [second["weight"]]
    if pair.batch_norm is None:
        scaled += [first["weight"], *[bias for bias in [first.get("bias")] if bias is not None]]
    else:
        norm = calls[pair.batch_norm].named
        if norm.get("weight") is None or norm.get("bias") is None or norm.get("running_var") is None:
            return False
        scaled += [norm["weight"], norm["bias"]]
    return all(parameters.name_of(tensor) is not None for tensor in scaled)


class _Weights:
    """The tensors of one pair, by name."""

    def __init__(self, pair: Pair, calls: Mapping[str, Call], parameters: Parameters) -> None:
        self.first, self.second = calls[pair.first], calls[pair.second]
        self.norm = None if pair.batch_norm is None else calls[pair.batch_norm].named
        self.columns = pair.columns
        divided = self.first.named if self.norm is None else self.norm
        self.divided = [name for key in ("weight", "bias") if (name := parameters.name_of(divided.get(key)))]
        self.read = str(parameters.name_of(self.second.named["weight"]))
        self.made = parameters.name_of(self.first.named["weight"])  # None where only its norm is written
        self.names = [*self.divided, self.read, *([self.made] if self.made else [])]

    def equalize(self, values: dict[str, Tensor]) -> float:
        """Scale ``values``; returns how far the farthest scale was from 1."""
        made = self.first.named["weight"].detach().double() if self.made is None else values[self.made]
        first = _over(made, self.first, outputs=True).abs().amax((1, 3)).flatten()
        if self.norm is not None:
            current = {**self.norm, "weight": values[self.divided[0]]}
            first = first * batch_norm_gain(current).abs()
        read = _over(values[self.read], self.second, outputs=False)
        second = read.abs().amax((1, 3)).reshape(-1, self.columns).amax(1)
        scales = equalizing_scales(first, second)
        for name in self.divided:
            values[name] = self._divided(values[name], scales)
        columns = scales.repeat_interleave(self.columns).reshape(read.shape[0], 1, read.shape[2], 1)
        values[self.read] = (read * columns).reshape(values[self.read].shape)
        return float((scales - 1).abs().max())

    def _divided(self, value: Tensor, scales: Tensor) -> Tensor:
        if value.dim() == 1:
            return value / scales
        rows = _over(value, self.first, outputs=True)
        return (rows / scales.reshape(rows.shape[0], 1, rows.shape[2], 1)).reshape(value.shape)


def _over(weight: Tensor, call: Call, *, outputs: bool) -> Tensor:
    """``(groups, others, channels of a group, kernel)``: the channels that a layer makes, or those that it reads."""
    if outputs == (kind_of(call.name) != "transposed"):  # they are rows
        return weight.reshape(1, 1, weight.shape[0], -1)
    groups = int(call.named.get("groups", 1))
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
