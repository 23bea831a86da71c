"""Depth: which residual blocks are removed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from typing_extensions import override

from lightning_light.depth.blocks import find_blocks, remove_blocks
from lightning_light.example_input import ExampleInput
from lightning_light.nas.choices import Change, Choices, Item
from lightning_light.order import Stage
from lightning_light.targets import Targets, as_targets, inside
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
        blocks, names = find_blocks(model, example, as_targets(self.targets)).names, dict(model.named_modules())
        parts = {block: frozenset(name for name in names if inside(name, [block])) for block in blocks}
        return [Item(self.kind, block, "removed", parts[block]) for block in blocks]

    @override
    def plan(
        self, model: nn.Module, example: ExampleInput, items: Sequence[Item], calls: Sequence[ExampleInput] = ()
    ) -> list[str]:
        return [item.target for item in items]

    @override
    def carry_out(self, model: nn.Module, plan: list[str], **followers: Any) -> Change:
        return Change(remove_blocks(model, plan, **followers))
