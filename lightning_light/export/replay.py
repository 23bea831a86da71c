"""The validation batches again, as ``forward`` receives them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_light.example_input import ExampleInput
from lightning_light.export.inputs import cloned
from lightning_light.export.top1 import Labelled

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["replayed"]


def replayed(trainer: Trainer, first: ExampleInput | None) -> Iterator[Labelled]:
    """The inputs and labels of all validation batches, if they are pairs whose first goes to ``forward`` as it is.

    Args:
        trainer: that has just validated; its loaders are asked once more, for as many batches.
        first: what ``forward`` received first in the last validation. If the first batch is another now, because it
            is shuffled or changed on the way, nothing is replayed.
    """
    loaders = trainer.val_dataloaders
    if first is None or loaders is None:
        return
    listed = loaders if isinstance(loaders, list | tuple) else [loaders]
    leaves = [leaf for leaf in tree_leaves((first.args, first.kwargs)) if isinstance(leaf, Tensor)]
    for place, (loader, limit) in enumerate(zip(listed, trainer.num_val_batches, strict=False)):
        for number, batch in enumerate(loader):
            if number >= limit:
                break
            given = trainer.precision_plugin.convert_input(batch)  # as the Trainer does, under "bf16-true" for instance
            pair = _pair(trainer.strategy.batch_to_device(given, torch.device("cpu"), dataloader_idx=place))
            if pair is None or not (number or place or (len(leaves) == 1 and _same(leaves[0], pair[0]))):
                return
            yield Labelled(cloned(_like(first, pair[0])), pair[1])


def _pair(batch: Any) -> tuple[Tensor, Tensor] | None:
    fits = isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(item, Tensor) for item in batch)
    return (batch[0], batch[1]) if fits else None


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())


def _like(first: ExampleInput, x: Tensor) -> ExampleInput:
    """The same call with another tensor."""
    args = tuple(x if isinstance(value, Tensor) else value for value in first.args)
    return ExampleInput(args, {key: x if isinstance(value, Tensor) else value for key, value in first.kwargs.items()})
