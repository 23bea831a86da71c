"""Depth: which residual blocks are removed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from typing_extensions import override

from lightning_light.depth.blocks import find_blocks, remove_blocks
from lightning_light.example_input import ExampleInput
from lightning_light.nas.choices import Change, Choices, Item
from lightning_light.order import Stage
from lightning_light.targets import Targets, as_targets
from lightning_light.validation import validated

__all__ = ["BlockChoices"]


@validated
@dataclass(frozen=True)
class BlockChoices(Choices):
    """Remove a residual block, as `DepthPruning` does.

    Args:
        targets: residual blocks that may be removed: patterns or `Targets`; all by default.

    Raises:
        TypeError: an argument has the wrong type.
    """

    kind = "blocks"
    stage = Stage.DEPTH

    targets: Targets | str | list[str] | None = None

    @override
    def items(self, model: nn.Module, example: ExampleInput) -> list[Item]:
        def inside(block: str) -> frozenset[str]:
            return frozenset(name for name, _ in model.named_modules() if f"{name}.".startswith(f"{block}."))

        names = find_blocks(model, example, as_targets(self.targets)).names
        return [Item(self.kind, name, "removed", inside(name)) for name in names]

    @override
    def plan(
        self, model: nn.Module, example: ExampleInput, items: Sequence[Item], calls: Sequence[ExampleInput] = ()
    ) -> list[str]:
        return [item.target for item in items]

    @override
    def carry_out(
        self,
        model: nn.Module,
        plan: list[str],
        *,
        optimizers: Iterable[Any] = (),
        averaged_models: Sequence[nn.Module] = (),
    ) -> Change:
        return Change(remove_blocks(model, plan, optimizers=optimizers, averaged_models=averaged_models))
