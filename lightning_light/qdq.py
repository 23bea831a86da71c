"""Quantize-dequantize form: how a network says, in plain operations, where its numbers are on a grid.

What rounds numbers during training can write down each rounding as a pair of ``quantized_decomposed`` operations
instead, while the network is traced. An exporter reads the pairs, and does not have to know who wrote them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import nn

__all__ = ["RoundsNumbers", "as_qdq", "rounders_of"]


class RoundsNumbers(ABC):
    """Owns forward hooks of a network, and rounds numbers in it."""

    @abstractmethod
    def writing_qdq(self, call: Callable[[], Any]) -> AbstractContextManager[None]:
        """Inside, a forward pass has pairs of operations where it rounded.

        Args:
            call: one forward pass, in which scales of weights are found; inside they are constants.
        """


def rounders_of(model: nn.Module) -> list[RoundsNumbers]:
    """Who rounds numbers in ``model``: found by its hooks."""
    found: dict[int, RoundsNumbers] = {}
    for module in model.modules():
        for hook in [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]:
            owner = getattr(getattr(hook, "__self__", None), "frames", None)
            if isinstance(owner, RoundsNumbers):
                found[id(owner)] = owner
    return list(found.values())


@contextmanager
def as_qdq(model: nn.Module, call: Callable[[], Any]) -> Iterator[list[RoundsNumbers]]:
    """Inside, everything that rounds in ``model`` writes pairs; gives who that is."""
    rounders = rounders_of(model)
    with ExitStack() as stack:
        for rounder in rounders:
            stack.enter_context(rounder.writing_qdq(call))
        yield rounders
