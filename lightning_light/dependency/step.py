"""Trace the training step, for modules whose step does not call ``self(...)``."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_light.dependency.groups import DependencyGraph
from lightning_light.dependency.verification import trace_verified
from lightning_light.training_step import step_as_forward
from lightning_light.validation import validated

__all__ = ["trace_step"]


@validated
def trace_step(module: nn.Module, *args: Any, heads: str = "dim") -> DependencyGraph:
    """Find the dependency groups of what ``module.training_step(*args)`` runs, and verify each one.

    The step runs as in training: auxiliary heads, targets that outputs are compared with, and copies of layers that
    follow others are taken into account. It is isolated: see `step_as_forward`. Channels that no layer reads are
    outputs, which the step compares or returns, and are kept.

    Args:
        module: a LightningModule; it is left exactly as it was.
        args: arguments of its ``training_step``: a batch, and its number where the step takes it.
        heads: see `trace_dependencies`.

    Raises:
        TraceError: the training step fails on the batch given.
    """
    with step_as_forward(module):
        return trace_verified(module, args, {}, heads=heads, keep_unread=True)
