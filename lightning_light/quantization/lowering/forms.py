"""The forms of a rounded network that are exported, for as long as an exporter needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightning_light.int8 import Int8Form, Int8Weights, PairRules
from lightning_light.quantization.lowering.lowered import Lowered, Rounds
from lightning_light.quantization.lowering.on_kernels import Lowering
from lightning_light.quantization.lowering.pairs import Pairs, check_pairs
from lightning_light.quantization.news import without_news

__all__ = ["in_pairs", "on_kernels"]


@contextmanager
def on_kernels(attachment: Rounds, call: Callable[[], Any], engine: str) -> Iterator[Int8Form]:
    """As `RoundsNumbers.on_kernels`."""
    widest = max((rule.high for rule in attachment.plan.weights.values() if rule.bits == 8), default=0)
    Int8Weights(attachment.engine, widest).check(engine)
    before = torch.backends.quantized.engine
    try:
        torch.backends.quantized.engine = engine
        with _lowered(attachment, call, Lowering(attachment, engine)) as form:
            yield form
    finally:
        torch.backends.quantized.engine = before


@contextmanager
def in_pairs(attachment: Rounds, call: Callable[[], Any], rules: PairRules) -> Iterator[Int8Form]:
    """As `RoundsNumbers.in_pairs`."""
    check_pairs()
    with _lowered(attachment, call, Pairs(attachment, rules)) as form:
        yield form


@contextmanager
def _lowered(attachment: Rounds, call: Callable[[], Any], lowered: Lowered) -> Iterator[Int8Form]:
    try:
        attachment.lowered = lowered
        with torch.no_grad(), without_news():
            call()  # collects
            lowered.build()
            call()  # tries
        lowered.trying = False
        with without_news():
            yield lowered.described()
    finally:
        attachment.abandon()
        attachment.lowered = None
