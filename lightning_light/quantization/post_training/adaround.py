"""AdaRound: learn for each weight whether it is rounded up or down, layer by layer, to preserve the output."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_light.quantization.fake_quantize import SMALLEST_SCALE
from lightning_light.quantization.specs import WeightSpec
from lightning_light.validation import FractionBelowOne, PositiveFloat, PositiveInt, validated

__all__ = ["AdaRound", "learn_rounding", "logits_of", "dequantized", "rectified_sigmoid", "regularizer"]

ZETA, GAMMA = 1.1, -0.1
Batch = tuple[Tensor, Tensor]


@validated
@dataclass(frozen=True)
class AdaRound:
    """Learn which weights to round up and which down, without labels: nearest is not best.

    With ``h(V) = clip(sigmoid(V) * (zeta - gamma) + gamma, 0, 1)``, ``zeta = 1.1``, ``gamma = -0.1``, the weight
    ``s * clip(floor(w / s) + h(V))`` of each layer minimizes ``|f(W x) - f(W~ x~)|^2 + regularization * sum(1 - |2 h(V)
    - 1|^beta)``, where ``x~`` is the layer's input in the network that is quantized so far and ``f`` its batch norm and
    ReLU; ``beta`` falls along a cosine, so that in the end every ``h`` is 0 or 1.

    Nagel, Amjad, van Baalen, Louizos, Blankevoort, 2020, "Up or Down? Adaptive Rounding for Post-Training
    Quantization". https://arxiv.org/abs/2004.10568

    Example:
        >>> AdaRound(steps=500)
        AdaRound(steps=500, ...)

    Args:
        steps: of Adam, for each layer. The paper takes 10,000.
        batch_size: samples in a step; of one calibration batch, drawn again each time.
        learning_rate: Adam's.
        regularization: weight of the term that drives ``h`` to 0 or 1; the paper's is 0.01.
        warm_up: fraction of the steps without that term.
        beta: its exponent after the warm-up, and at the end.
        seed: of the batches.

    Raises:
        ValueError: an argument out of range.
    """

    steps: PositiveInt = 1000
    batch_size: PositiveInt = 32
    learning_rate: PositiveFloat = 0.01
    regularization: PositiveFloat = 0.01
    warm_up: FractionBelowOne = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.beta[0] >= self.beta[1] > 1:
            raise ValueError(
                f"`AdaRound(beta={self.beta})`: expected two exponents that fall, above 1, found others. Write "
                "for instance (20.0, 2.0)."
            )

    def beta_at(self, step: int) -> float | None:
        """The exponent at ``step``; None in the warm-up.

        Example:
            >>> settings = AdaRound(steps=100, warm_up=0.2)
            >>> settings.beta_at(19), settings.beta_at(20), settings.beta_at(60)
            (None, 20.0, 11.0)
        """
        begin = self.warm_up * self.steps
        if step < begin:
            return None
        first, last = self.beta
        return last + (first - last) * (1 + math.cos(math.pi * (step - begin) / (self.steps - begin))) / 2


def rectified_sigmoid(v: Tensor) -> Tensor:
    """``h(V) = clip(sigmoid(V) * (zeta - gamma) + gamma, 0, 1)``: reaches 0 and 1, where its gradient is 0."""
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def logits_of(h: Tensor) -> Tensor:
    """The ``V`` of ``h`` in [0, 1].

    Example:
        >>> rectified_sigmoid(logits_of(torch.tensor([0.0, 0.25, 1.0])))
        tensor([0.0000, 0.2500, 1.0000])
    """
    return -((ZETA - GAMMA) / (h - GAMMA) - 1).log()


def regularizer(h: Tensor, beta: float) -> Tensor:
    """``sum(1 - |2 h - 1|^beta)``: 0 where every ``h`` is 0 or 1."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def learn_rounding(
    weight: Tensor,
    spec: WeightSpec,
    batches: Sequence[Batch],
    forward: Callable[[Tensor, Tensor], Tensor],
    channels: int,
    settings: AdaRound,
    *,
    subsets: bool = True,
) -> Tensor:
    """The dequantized weight ``s * q``: each ``q`` is next to ``weight / s``, above it or below.

    Zeros stay zero, so that masks survive, and what is largest in its channel stays as it is, so that the scale that
    is taken from the result is the same to the last bit. If nearest rounding has the smaller error, that is the result.

    Args:
        weight: the float weight.
        spec: how it is quantized, uniformly.
        batches: inputs of the quantized network with outputs of the float one.
        forward: input and weight -> output.
        channels: the dimension of an output that counts channels.
        settings: how it is learned.
        subsets: whether a step may take a part of a batch along its first dimension.
    """
    limit = spec.quant_max
    largest = weight.abs().amax(list(range(int(spec.per_channel), weight.dim())), keepdim=True)
    scale = (largest / limit).clamp_min(SMALLEST_SCALE)
    nearest, down = (weight / scale).round(), (weight / scale).floor()
    fixed = (weight == 0) | (weight.abs() == largest) | (nearest == weight / scale)

    def error(q: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return (forward(x, q * scale) - y).square().sum(channels).mean()

    def weights(h: Tensor) -> Tensor:
        return torch.where(fixed, nearest, (down + h).clamp(-limit, limit))

    v = logits_of(weight / scale - down).requires_grad_()
    optimizer = torch.optim.Adam([v], settings.learning_rate)
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.enable_grad():
        for step in range(settings.steps):
            h, beta = rectified_sigmoid(v), settings.beta_at(step)
            loss = error(weights(h), *_drawn(batches, settings.batch_size if subsets else None, generator))
            if beta is not None:
                loss = loss + settings.regularization * regularizer(h[~fixed], beta)
            (v.grad,) = torch.autograd.grad(loss, v)  # and none of the network's own parameters
            optimizer.step()
    with torch.no_grad():
        learned = weights((rectified_sigmoid(v) >= 0.5).to(v))
        before, after = (sum(float(error(q, x, y)) for x, y in batches) for q in (nearest, learned))
        return dequantized(learned if after < before else nearest, largest, limit)


def dequantized(q: Tensor, largest: Tensor, limit: int) -> Tensor:
    """``q * largest / limit``, where ``limit`` gives ``largest`` itself and not what it is rounded to in between."""
    return torch.where(q.abs() == limit, q.sign() * largest, q * (largest / limit).clamp_min(SMALLEST_SCALE))


def _drawn(batches: Sequence[Batch], size: int | None, generator: torch.Generator) -> Batch:
    x, y = batches[int(torch.randint(len(batches), (), generator=generator))]
    if size is None or size >= len(x):
        return x, y
    chosen = torch.randperm(len(x), generator=generator)[:size].to(x.device)
    return x[chosen], y[chosen]
