"""Criteria of depth pruning: how much a network depends on a residual block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_light.depth.blocks import without_blocks
from lightning_light.example_input import ExampleInput
from lightning_light.isolation import isolated, observe
from lightning_light.nested import tensors_in

__all__ = ["BlockCriterion", "BlockInfluence", "OutputChange"]


class BlockCriterion(ABC):
    """Score residual blocks; the block with the lowest score is removed first."""

    @abstractmethod
    def __call__(self, model: nn.Module, names: Sequence[str], calls: Sequence[ExampleInput]) -> dict[str, float]:
        """Score the blocks ``names`` of ``model`` on ``calls``, one per batch; the model is left as it is."""


@dataclass(frozen=True)
class OutputChange(BlockCriterion):
    """Score ``|y' - y|**2 / |y|**2`` of the outputs of the network with the block (y) and without it (y').

    One more forward pass per block and batch. The output is every floating-point tensor that ``forward`` returns.
    """

    @override
    def __call__(self, model: nn.Module, names: Sequence[str], calls: Sequence[ExampleInput]) -> dict[str, float]:
        with isolated(model):
            outputs = [_output(model, call) for call in calls]
            scores = {}
            for name in names:
                with without_blocks(model, [name]):
                    pairs = [(_output(model, call), y) for call, y in zip(calls, outputs, strict=True)]
                changes = [float((new - y).square().sum() / y.square().sum().clamp_min(1e-12)) for new, y in pairs]
                scores[name] = sum(changes) / len(changes)
        return scores


@dataclass(frozen=True)
class BlockInfluence(BlockCriterion):
    """Score ``1 - mean(cos(x, y))`` of the inputs x and the outputs y of the block, per position.

    One forward pass per batch for all blocks. The cosine is that of the channels: dimension 1 of images, the last one
    of sequences.

    Men et al., 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect".
    https://arxiv.org/abs/2403.03853
    """

    @override
    def __call__(self, model: nn.Module, names: Sequence[str], calls: Sequence[ExampleInput]) -> dict[str, float]:
        similarities: dict[str, list[float]] = {name: [] for name in names}

        def record(name: str, block: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Tensor) -> None:
            x = args[0]
            cosine = F.cosine_similarity(x.float(), output.float(), dim=1 if x.dim() > 3 else -1)
            similarities[name].append(cosine.mean().item())

        observe(model, {name: model.get_submodule(name) for name in names}, calls, record)
        return {name: 1.0 - sum(values) / len(values) for name, values in similarities.items()}


def _output(model: nn.Module, call: ExampleInput) -> Tensor:
    output = model(*call.args, **call.kwargs)
    return torch.cat([tensor.float().flatten() for tensor in tensors_in(output) if tensor.is_floating_point()])
