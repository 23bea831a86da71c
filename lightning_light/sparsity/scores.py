"""Score weights by a criterion and the evidence that was gathered for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_light.criteria.evidence import Criterion
from lightning_light.criteria.gathered import PARAMETER_KINDS, Gathered
from lightning_light.errors import UnsupportedError
from lightning_light.sparsity.weights import MaskableWeight

__all__ = ["check_evidence", "score_weights"]

_READABLE = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)


def check_evidence(method: str, criterion: Criterion, weights: Sequence[MaskableWeight]) -> None:
    """Refuse evidence that can never be gathered: gradients of frozen weights, inputs that no hook can read.

    Raises:
        UnsupportedError: names the layers.
    """
    if criterion.needs & PARAMETER_KINDS:
        frozen = [weight.layer for weight in weights if not weight.parameter.requires_grad]
        if frozen:
            raise UnsupportedError(
                f"`{method}(criterion={criterion!r})`: expected trainable weights, found frozen ones, which have no "
                f"gradient, in {frozen[:3]}. Exclude them, `targets=Targets(exclude={frozen})`, or use `Magnitude()`."
            )
    if "inputs" in criterion.needs:
        others = [weight.layer for weight in weights if not isinstance(weight.module, _READABLE)]
        if others:
            raise UnsupportedError(
                f"`{method}(criterion={criterion!r})`: expected linear and convolution layers, whose inputs can be "
                f"read, found others: {others[:3]}. Exclude them: `targets=Targets(exclude={others})`."
            )


def score_weights(
    weights: Sequence[MaskableWeight], criterion: Criterion, gathered: Gathered, generator: torch.Generator
) -> dict[str, Tensor]:
    """Score every weight; by weight name, as ``(out, in, *kernel)``.

    Raises:
        UnsupportedError: nothing was gathered for a weight: it is not used, or its gradient is always None.
    """
    scores = {}
    for weight in weights:
        differential = bool(criterion.needs & PARAMETER_KINDS)  # of what is trained; else of what is computed with
        evidence = gathered.evidence(
            criterion,
            weight.parameter if differential else weight.source.computed(),
            name=weight.name,
            layer=weight.layer,
            module=weight.module,
            dim=weight.output_dim,
            generator=generator,
        )
        scores[weight.name] = criterion(evidence)
    return scores
