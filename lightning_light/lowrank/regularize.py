"""Regularizers that prepare layers for factorization: their gradients are added before the optimizer step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_light.validation import PositiveFloat, validated

__all__ = ["NuclearNorm", "Orthogonality", "RankRegularizer", "add_regularizer_gradients"]


class RankRegularizer(ABC):
    """Regularize the matrices ``(out, in * kernel)`` of the layers that will be factorized."""

    @abstractmethod
    def gradient(self, matrix: Tensor) -> Tensor:
        """Return the gradient of the regularizer, in the shape of ``matrix``."""


@validated
@dataclass(frozen=True)
class NuclearNorm(RankRegularizer):
    """Add ``strength * sum of singular values``, which drives small singular values to zero.

    The gradient is ``strength * U V^T`` (Watson, 1992); singular values of zero have none. Used as a
    subgradient in Xu et al., 2019, "Trained Rank Pruning for Efficient Deep Neural Networks".
    https://arxiv.org/abs/1812.02402

    Args:
        strength: above 0, on the scale of a weight decay, for instance 3e-4.

    Raises:
        ValueError: ``strength`` is not above 0.
    """

    strength: PositiveFloat = 3e-4

    @override
    def gradient(self, matrix: Tensor) -> Tensor:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        present = (values > values.amax() * 1e-6).to(matrix.dtype)
        gradient: Tensor = self.strength * (left * present) @ right
        return gradient


@validated
@dataclass(frozen=True)
class Orthogonality(RankRegularizer):
    """Add ``strength / 2 * ||G - I||^2`` of the smaller Gram matrix ``G``, which keeps singular values close to 1.

    Bansal et al., 2018, "Can We Gain More from Orthogonality Regularizations in Training Deep Networks?", the soft
    orthogonality of section 3.1 (there of ``W^T W``). https://arxiv.org/abs/1810.09102. It keeps factors well
    conditioned, and does not lower the rank by itself.

    Args:
        strength: above 0, for instance 1e-3.

    Raises:
        ValueError: ``strength`` is not above 0.
    """

    strength: PositiveFloat = 1e-3

    @override
    def gradient(self, matrix: Tensor) -> Tensor:
        if matrix.shape[0] > matrix.shape[1]:
            return self.gradient(matrix.mT).mT
        gram = matrix @ matrix.mT
        return 2.0 * self.strength * (gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)) @ matrix


def add_regularizer_gradients(
    regularizer: RankRegularizer, layers: Iterable[nn.Module], parameters: Iterable[nn.Parameter]
) -> None:
    """Add the gradient of ``regularizer`` to the ``.grad`` of the layers' weights.

    Args:
        regularizer: defines the gradient.
        layers: linear layers, convolutions, embeddings.
        parameters: those of the coming optimizer step; other weights are left alone.
    """
    mine = set(parameters)
    for layer in layers:
        weight = layer.weight
        if isinstance(weight, nn.Parameter) and weight in mine and weight.grad is not None:
            groups: int = getattr(layer, "groups", 1)
            matrices = weight.detach().float().reshape(groups, len(weight) // groups, -1)
            gradients = torch.stack([regularizer.gradient(matrix) for matrix in matrices])
            weight.grad.add_(gradients.reshape(weight.shape).to(weight.grad.dtype))
