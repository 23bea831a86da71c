"""The plan again, as a runtime is told of it: what the two forms of a lowered network have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_light.int8 import Int8Form
from lightning_light.quantization.lowering.weights import Scale, Weight, folded
from lightning_light.quantization.operations import BATCH_NORM, arguments, kind_of
from lightning_light.quantization.places import module_of
from lightning_light.quantization.plan import Group, Plan
from lightning_light.quantization.rules import Grid, WeightRule

__all__ = ["ASKS", "Lowered", "Rounds", "scalar"]

ASKS: Final = frozenset(
    {"__get__", "size", "dim", "numel", "ndimension", "is_floating_point", "__len__", "is_contiguous"}
)
"""Operations that read a shape or a type, and no number."""


class Rounds(Protocol):
    """What is asked of the attachment whose network is lowered."""

    plan: Plan
    engine: str
    scales: list[Scale | None]
    grids: list[Grid]
    lowered: Lowered | None

    def weight(self, key: str) -> tuple[WeightRule, Tensor | None]:
        """How the weight of an operation is rounded: the rule, and its scale if that is learned."""

    def before(self, key: str, kind: str, args: list[Any], kwargs: dict[str, Any]) -> None:
        """Round a weight, and inputs of the network."""

    def abandon(self) -> None:
        """End a call that an error has left."""


class Lowered(ABC):
    """Computes a forward pass as a runtime will, in three rounds: collect, try, run.

    The first notes the weights and statistics of every group. The second finds out what cannot be done, which stays
    float, between tensors on their grids. The third does the same again, and can be traced.

    Attributes:
        attachment: whose plan it is.
        weights: operation -> its weight in whole numbers.
        refused: operation -> why it stays float.
        scales_of_outputs: what the network gives, as `Int8Form` has it.
        collecting: whether this is the first round; it runs with rounded numbers.
        trying: whether this is the first or the second.
    """

    def __init__(self, attachment: Rounds) -> None:
        self.attachment, self.plan, self.scales = attachment, attachment.plan, attachment.scales
        self.weights: dict[str, Weight] = {}
        self.refused: dict[str, str] = dict(self.plan.without_kernel)
        self.scales_of_outputs: Any = None
        self.collecting = self.trying = True
        self._collected: dict[str, dict[str, Any]] = {}
        self._heads = {
            part: head for head, group in self.plan.groups.items() for part in (group.batch_norm, group.relu) if part
        }

    def collect(self, key: str, name: str, args: list[Any], kwargs: Mapping[str, Any]) -> None:
        """Note the arguments of a layer or batch norm, by name."""
        if key in self.plan.weights or (key in self._heads and kind_of(name) == BATCH_NORM):
            self._collected[key] = arguments(name, args, kwargs)

    def build(self) -> None:
        """Fold every layer, and go on to the second round."""
        for key in [key for key in self.plan.weights if key not in self.refused]:
            if reason := self._lacks(key) or self._fold(key):
                self.refused[key] = reason
        for key in list(self.weights):
            self._prepare(key, key.split("|")[2], self._collected[key])
        self._collected, self.collecting = {}, False

    def _lacks(self, key: str) -> str | None:
        """What a kernel would need and is not there: XNNPACK takes a layer without its input's grid, and errs."""
        if key not in self._collected:
            return "the network did not come by it"
        if self.scales[self.plan.reads[key]] is None:
            return "its input was never observed"
        return "its output was never observed" if self._scale_of(self.plan.groups[key]) is None else None

    def _fold(self, key: str) -> str | None:
        """Note the weight in whole numbers, or say why no kernel takes it."""
        group = self.plan.groups[key]
        reads, writes = self.scales[self.plan.reads[key]], self._scale_of(group)
        assert reads is not None  # `_lacks` has said so
        assert writes is not None
        norm = None if group.batch_norm is None else self._collected[group.batch_norm]
        weight = folded(self._collected[key], norm, *self.attachment.weight(key), reads[0], writes[0])
        if weight.is_too_coarse(reads[0], writes[0]):
            return "one step of its sums is more than the whole grid of its output"
        self.weights[key] = weight
        return None

    @abstractmethod
    def _prepare(self, key: str, name: str, args: Mapping[str, Any]) -> None:
        """Make ready what runs a layer, or refuse it; all weights are known."""

    @abstractmethod
    def run(self, key: str, name: str, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """One operation, in the second and the third round."""

    def finish(self, output: Any) -> Any:
        """What the outermost call gives, in float."""
        if self.trying:
            scaled = tree_map(lambda leaf: self._scale_at(leaf) if isinstance(leaf, Tensor) else leaf, output)
            self.scales_of_outputs = scaled
        return self._in_the_end(output)

    @abstractmethod
    def _scale_at(self, leaf: Tensor) -> Tensor:
        """The scale of one output, as a scalar; 0 if it is on no grid."""

    @abstractmethod
    def _in_the_end(self, output: Any) -> Any:
        """The outputs in float."""

    def described(self) -> Int8Form:
        """What an exporter shall know."""
        layers = [key for key in self.weights if key not in self.refused]
        return Int8Form(
            scales=self.scales_of_outputs,
            layers=len(layers),
            left_float=self.left_float(),
            modules=frozenset(map(module_of, layers)),
        )

    def left_float(self) -> dict[str, str]:
        """Layers with a weight that stay float, and why."""
        refused = {module_of(key): reason for key, reason in self.refused.items() if key in self.plan.weights}
        return {**self.plan.left_float, **refused}

    def _is_done_by_its_layer(self, key: str) -> bool:
        head = self._heads.get(key)
        return head is not None and head not in self.refused

    def _scale_of(self, group: Group) -> Scale | None:
        return self.scales[self.plan.outputs[group.tail]]


def scalar(scale: float) -> Tensor:
    """As `Int8Form.scales` holds it."""
    return torch.tensor(scale, dtype=torch.float64)
