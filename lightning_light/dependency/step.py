"""Trace the training step together with ``forward``: what only training reads ties and locks channels too."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_light.dependency.groups import ChannelGroup, DependencyGraph
from lightning_light.dependency.trace import UNUSED, Tracer
from lightning_light.dependency.verification import trace_verified
from lightning_light.example_input import ExampleInput
from lightning_light.training_step import step_as_forward
from lightning_light.validation import validated

__all__ = ["trace_calls"]


@validated
def trace_calls(module: nn.Module, calls: Sequence[ExampleInput], *, heads: str = "dim") -> DependencyGraph:
    """Find the dependency groups of what ``calls`` of ``module`` run together, and verify each one.

    The training step runs as in training: auxiliary heads, targets that outputs are compared with, and copies of layers
    that follow others are taken into account. It runs in isolation: nothing is logged, and ``backward`` and
    optimizers do nothing. Three kinds of channels are kept
    beside those that the code fixes: those that no layer reads, which a step compares or returns; those of frozen
    networks whose outputs no trained layer reads, such as a teacher; and those that a layer might read which has not
    run.

    Args:
        module: a LightningModule; it is left exactly as it was.
        calls: of its ``forward`` and its steps.
        heads: see `trace_dependencies`.

    Raises:
        TraceError: a call fails.
    """

    def protect(tracer: Tracer, graph: DependencyGraph) -> None:
        unread = [group for group in graph.groups if not any(member.role == "in" for member in group.members)]
        for groups, reason in (
            (unread, "is read by no layer: the training step compares or returns it"),
            (_of_helpers(module, graph), "belongs to a frozen network whose output no trained layer reads"),
            (_maybe_read(module, graph), "may be read by a layer that the first batch does not run"),
        ):
            for group in groups:
                if group.reason is None:
                    tracer.union.protect(group.roots, reason)

    with step_as_forward(module, calls):
        return trace_verified(module, (), {}, heads=heads, protect=protect)


def _of_helpers(module: nn.Module, graph: DependencyGraph) -> list[ChannelGroup]:
    """Return the groups from which no path of layers leads to a trained parameter."""
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    readers: dict[str, list[ChannelGroup]] = {}
    for group in graph.groups:
        for member in group.members:
            if member.role == "out":
                readers.setdefault(member.tensor, []).append(group)
    reached = {g.name for g in graph.groups if any(member.tensor in trained for member in g.members)}
    found = list(graph.groups) if trained else []
    while len(found) != len(found := [group for group in found if group.name not in reached]):
        for group in found:
            read = [after.name for m in group.members if m.role == "in" for after in readers.get(m.tensor, ())]
            if reached.intersection(read):
                reached.add(group.name)
    return found


def _maybe_read(module: nn.Module, graph: DependencyGraph) -> list[ChannelGroup]:
    """Return the groups in tensors of the width that a trained layer reads which has not run."""
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    unused = [
        m for g in graph.groups if g.reason == UNUSED for m in g.members if m.role == "in" and m.tensor in trained
    ]
    widths = {graph.shapes[member.tensor][member.dim] for member in unused}
    return [
        group
        for group in graph.groups
        if any(graph.shapes[m.tensor][m.dim] in widths for m in group.members if m.role in ("in", "out"))
    ]
