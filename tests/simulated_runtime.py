"""A runtime whose latency is a formula of the network's shapes, so that tests have exact figures."""

from dataclasses import dataclass
from math import ceil, prod

from torch import nn
from typing_extensions import override

from lightning_light.example_input import ExampleInput
from lightning_light.measure.latency_operators import operator_calls
from lightning_light.runtime import Runtime

MEASURED: list[str] = []
"""Digests of the networks that were measured, in order."""


@dataclass(frozen=True)
class Simulated(Runtime):
    """Count microseconds per block of channels, as processors with wide registers do.

    Attributes:
        block: channels that are computed together.
        overhead: seconds of each file, beside its operators.
        slower: factor between a network and the sum of its operators.
    """

    block: int = 1
    overhead: float = 0.0
    slower: float = 1.0

    @override
    def check(self) -> None: ...

    @override
    def runtime(self) -> str:
        return "simulated 1.0"

    @override
    def seconds(self, model: nn.Module, example: ExampleInput, threads: int) -> float:
        calls = operator_calls(model, example)
        MEASURED.append(calls.digest)
        total = 0.0
        for operator, count in calls.operators.items():
            outputs, inputs, *kernel = operator.weight
            blocks = ceil(outputs / self.block) * ceil(inputs / self.block) * self.block**2
            total += 1e-9 * count * blocks * prod(kernel) * prod(operator.input[2:])
        one_operator = len(calls.operators) == 1
        return total * (1.0 if one_operator else self.slower) + (0.0 if one_operator else self.overhead)
