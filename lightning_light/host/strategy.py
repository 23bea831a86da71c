"""Rebuild what a strategy holds of the network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["rebuild_ddp"]


def rebuild_ddp(trainer: Trainer) -> None:
    """Wrap the changed network in ``DistributedDataParallel`` again, with a new reducer; nothing without DDP.

    The old reducer knows parameters of the old shapes: with it the ranks would drift apart without an error.
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
