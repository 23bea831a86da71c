"""Rebuild what a strategy holds of the network, and read what it writes."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["read_sharded_checkpoint", "rebuild_ddp"]


def read_sharded_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of a strategy that shards parameters; of a distributed one what is not sharded.

    Empty where it holds objects that ``weights_only`` refuses: the Trainer is about to decide on those.
    """
    file = Path(path) / "meta.pt" if Path(path).is_dir() else Path(path)
    try:
        checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        return {}
    return checkpoint


def rebuild_ddp(trainer: Trainer) -> None:
    """Wrap the changed network in ``DistributedDataParallel`` again, with a new reducer; nothing without DDP.

    The old reducer holds parameters of the old shapes: with it the ranks would drift apart without an error.
    """
    strategy: Any = trainer.strategy
    if not isinstance(strategy.model, DistributedDataParallel):
        return
    module = trainer.lightning_module
    old: Any = strategy.model
    strategy.model = module
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad = parameter.grad.clone()  # it may be a view of one of the old buckets
    old.reducer = old.logger = None  # only the end of the reducer removes its hooks from the parameters
    if hasattr(strategy, "_pl_static_graph_delay_done"):
        strategy._pl_static_graph_delay_done = False
    strategy.configure_ddp()
